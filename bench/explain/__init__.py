"""``hicache-io explain`` and ``hicache-io policy``: what would run here and why, and what a file says.

``command`` and ``policy_command`` are the commands, with ``shared`` between them; ``explanation`` is all that
is said about one decision, ``matrix`` the table of many, ``what_if`` reads other facts; ``render`` prints.
"""
