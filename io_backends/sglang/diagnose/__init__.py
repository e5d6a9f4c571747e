"""Runs in ``hicache-io doctor`` and ``explain --server-args``: looks, and changes nothing.

``doctor`` prints what ``checks`` find about the machine and ``server_checks`` about one server. ``dry_run``
has SGLang resolve a command line, in a process whose code is ``dry_run_child``; ``command_line`` reads the
text that people have of one, with ``shell_*``, ``programs`` and ``containers`` below it, all of them without
SGLang; ``serving`` says what a server would make of a decision.

Imports ``launcher``, ``handover``, ``no_gpu``, ``pools`` and what is above; imported by commands only.
"""
