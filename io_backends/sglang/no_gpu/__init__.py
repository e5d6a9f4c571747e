"""Runs where there is no GPU: what stands in for it, so that real servers start in tests and demonstrations.

``fake_libcuda`` builds a driver library for child processes, and imports nothing of this package.
``stand_in_gpu`` lets ``torch.cuda`` tell of a GPU, so that SGLang resolves a command line for it.
``cpu_engine`` supplies what HiCache lacks on SGLang's CPU engine, in a scheduler whose device is the CPU.

Imports ``pools`` and what is above; imported by ``scheduler``, ``diagnose`` and commands.
"""
