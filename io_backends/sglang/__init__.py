"""The only folder of ``io_backends`` that knows SGLang, in parts by the process that runs them.

``plugin.load`` is SGLang's entry point, in every process that loads plug-ins. ``versions`` says which SGLang
is known and how each release differs: the one place that a new release touches for certain. Then:

- ``launcher/``: the process that is started by a person. Adds the options, and decides once when SGLang has
  resolved its arguments.
- ``handover/``: takes the decision to every scheduler, and stops a server whose ranks would not all act on
  it.
- ``pools/``: what SGLang's host pools hold and who writes them, for a server that runs or one that would.
- ``scheduler/``: a scheduler that serves. Hooks, fences, and each write's way to host memory.
- ``diagnose/``: ``hicache-io doctor`` and ``explain --server-args``; no server runs.
- ``no_gpu/``: what stands in for a GPU and its driver in tests and demonstrations.

``unsafe`` leaves out fences on purpose, for experiments, and so is in all of them; ``errors`` has the one
exception for what is refused. What a folder may import is in its own first lines, and ``tests/`` holds it to
that.
"""
