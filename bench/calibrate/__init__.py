"""``hicache-io calibrate``: measures on this machine what a policy needs to know, and writes rules for it.

``run`` measures, ``calibration`` makes numbers of measurements, ``machine_policy`` makes rules of them.
"""
