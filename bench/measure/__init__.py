"""What write-back costs on this machine: measurements, who takes part, and what is made of the figures.

``cases``           what is written: model, layout, page size, tokens, contiguity, attention backend
``devices``         the GPU, or the CPU in its place, with events that measure time
``memory``          device rows and a host buffer, filled afresh and compared byte for byte
``contenders``      this project's backends, ``auto``, a plain copy loop; ``sglang_pools``: SGLang's own paths
``stand_ins``       kernels that stand for a forward
``timing``          repeats, interleaved; ceilings of the link and of the GPU's memory
``one_write``       the measurements ``bandwidth``, ``fence`` and ``latency``
``submit``          the measurement of the scheduler's thread; ``submit_idle``: without a GPU
``interference``    the measurement of forwards beside write-back
``judge``           whether ``auto`` was the fastest safe choice
``results``         rows, JSON, CSV; ``environment``: where they come from
``tables``          and ``plots`` and ``report`` show results; ``compare`` sets two runs side by side
``suite``           runs measurements within a time budget; ``command`` is ``hicache-io bench``

Figures from a machine without a GPU exercise the code and say so in every form: they are no GPU speed.
"""
