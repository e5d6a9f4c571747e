"""What decides: which D2H backend runs, and which forwards wait for it.

Read in this order: ``vocabulary`` (names that may be typed), ``facts`` (what is known of a server),
``conditions``, ``versions`` and ``reach`` (what one condition accepts, and rules that can never match),
``fields``, ``options`` and ``schema`` (the file format), ``layers`` (what several files mean together) and
``load`` (a file to a `Policy`, or one error with its line, which ``yaml_text``, ``text``, ``errors`` and
``wording`` put together), ``match``, ``routes``, ``evidence`` and ``decide`` (a policy and facts to a
`Decision`). For the ``hicache-io`` command: ``classes``, ``protection`` and ``lint`` (what a layer of policy
takes away), ``explanation``, ``words``, ``cost``, ``what_if``, ``matrix``, ``serving``, ``json_schema``,
``render`` and ``commands``. ``default.yaml`` is the shipped policy, ``figures.yaml`` what was measured.
Nothing here imports torch or SGLang when imported.
"""
