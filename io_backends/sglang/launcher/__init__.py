"""Runs in the launching process (``sglang serve``, ``sglang.Engine``), before any scheduler starts.

``options`` adds what a person may type, ``resolution`` decides when SGLang has resolved its arguments. It
hands the decision over by :mod:`~..handover`, and registers the one hook of :mod:`~..scheduler` that a forked
scheduler finds.

Imports ``handover``, ``scheduler`` and what is above; imported by ``plugin`` and ``diagnose``.
"""
