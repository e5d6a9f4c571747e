"""Runs in ``hicache-io doctor`` and ``explain --server-args``: looks, and changes nothing.

``doctor`` prints what ``checks`` find about the machine and ``server_checks`` about one server. ``dry_run``
resolves a command line as SGLang would, in a child process; ``serving`` says what a server would make of a
decision.

Imports ``launcher``, ``handover``, ``no_gpu``, ``scheduler.pool_geometry`` and what is above; imported by
commands only.
"""
