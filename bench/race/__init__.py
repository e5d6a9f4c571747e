"""``hicache-io race``: SGLang's cache and write-back on a virtual GPU, and the races that no fence orders.

``command`` is the command line, ``result`` what its seeds gave together, ``timeline`` one step by a cost
model; ``simulation`` runs SGLang's own code.
"""
