"""The only folder that knows SGLang. A new SGLang version touches this folder and nothing else.

``plugin.load`` is SGLang's entry point. ``options`` adds the command line options, ``resolution`` makes the
decision in the launching process from ``server_facts``, ``carried`` takes it to the schedulers, ``runtime``
switches the hooks on there, ``ranks`` makes sure that all of them act alike, ``writeback`` routes each write
and inserts the fences, ``pools`` describes SGLang's pools, ``versions`` says which SGLang is known,
``cpu_engine`` supplies what HiCache lacks without a GPU. ``dry_run`` resolves a command line without starting
it; ``doctor`` prints what ``findings`` and ``server_findings`` find.
"""
