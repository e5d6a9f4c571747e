"""What decides: which D2H backend runs, and which forwards wait for it.

Read in this order: ``names`` (what may be typed), ``facts`` (what is known of a server), ``conditions`` and
``version_sets`` (what one condition accepts), ``format`` (the policy file), ``match``, ``routes``,
``evidence`` and ``decide`` (a policy and facts to a `Decision`). What a layer of policy takes away is found
by ``classes`` and ``unfenced``; ``sentences`` and ``cost`` say what a decision means. ``default.yaml`` is the
shipped policy, ``figures.yaml`` what was measured.
"""
