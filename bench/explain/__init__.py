"""``hicache-io explain`` and ``hicache-io policy``: what would run here and why, and what a file says.

``command`` holds the subcommands; ``explanation`` is all that is said about one decision, ``matrix`` the
table of many, ``what_if`` reads other facts, and ``render`` prints all of it.
"""
