"""What decides: which D2H backend runs, and which forwards wait for it. Imports nothing else of this project.

Read in this order: ``names`` (what may be typed), ``fact_spec`` and ``fact_table`` (the facts that there
are), ``facts`` (what is known of one server), ``backend_spec`` (what a backend says of itself),
``conditions`` and ``version_sets`` (what one condition accepts), ``format`` (the policy file), ``match``,
``routes``, ``evidence`` and ``decide`` (a policy and facts to a `Decision`). What a layer of policy takes
away is found by ``classes`` and ``unfenced``; ``sentences`` and ``cost`` say what a decision means.
``default.yaml`` is the shipped policy, ``figures.yaml`` what was measured. `io_backends.policy_files` reads
policies with the backends that there are.
"""
