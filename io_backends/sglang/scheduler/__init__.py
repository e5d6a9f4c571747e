"""Runs in every scheduler that serves with one of this project's backends, and in no other process.

This is what must be read again for a new SGLang. ``scheduler_hooks`` switches the hooks on. ``writeback``
routes each write, by ``indices`` that are left in place and pools that ``pool_registry`` remembers, between
the ``fences``. ``kernels`` limits and orders SGLang's own copy kernels, ``deferred_event`` stands for a write
that is not enqueued yet, ``writes`` counts.

Imports ``handover``, ``metrics``, ``no_gpu``, ``pools`` and what is above; never ``launcher``, ``diagnose``.
"""
