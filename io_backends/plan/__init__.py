"""What a write copies, and through how much staging: pure functions of numbers, tested on ordinary memory.

``geometry`` says where a pool's rows lie, ``copies`` goes straight from device rows to host rows, ``chunks``
and ``staged_write`` go through the staging ring, ``ring`` hands out its memory and ``ring_size`` says how
much of it there is. Nothing here imports torch or a device.
"""
