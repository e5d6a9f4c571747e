"""Runs in the launching process and at the start of every scheduler: one decision, and nobody without it.

``decision_handover`` carries the decision on ``ServerArgs``, and keeps a scheduler from starting where the
plug-in is not at work. ``server_facts`` reads what the decision rests on, from arguments and from a built
scheduler, and compares the two. ``ranks`` makes sure that all schedulers of a server act alike.

Imports ``pools`` and what is above; imported by ``plugin``, ``launcher``, ``scheduler`` and ``diagnose``.
"""
