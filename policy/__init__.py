"""What decides: which D2H backend runs, and which forwards wait for it.

Read in this order: ``vocabulary`` (names that may be typed), ``facts`` (what is known of a server),
``conditions`` and ``reach`` (what one condition accepts, and rules that can never match), ``fields`` and
``schema`` (the file format), ``load`` (a file to a `Policy`, or one error with its line), ``decide`` (a
policy and facts to a `Decision`), and for the ``hicache-io`` command ``json_schema``, ``render`` and
``commands``. ``default.yaml`` is the shipped policy. Nothing here imports torch or SGLang when imported.
"""
