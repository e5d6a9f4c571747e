"""SGLang's host pools: what they hold, and who writes them to the host.

``geometry`` describes a pool to the backends, or says why none of them serves it; ``records`` does so for
pools that hold something other than rows of keys and values. ``host_pools`` lists a server's pools with their
share of what is written: of a built scheduler, or of one that ``prediction`` builds small on the CPU for a
command line.

Imports what is above only; imported by every part that looks at pools.
"""
