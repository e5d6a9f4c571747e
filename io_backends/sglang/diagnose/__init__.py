"""Runs in ``hicache-io doctor`` and ``explain --server-args``: looks, and changes nothing.

``doctor`` prints what ``checks`` find about the machine and ``server_checks`` about one server. ``dry_run``
resolves a command line as SGLang would, in a child process.

Imports ``launcher``, ``handover``, ``no_gpu`` and what is above; imported by commands only.
"""
