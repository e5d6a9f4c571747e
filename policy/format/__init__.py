"""The policy file: what it may say, how it is read or refused, and what several files mean together.

``schema`` and ``validators`` are the format; ``load`` turns a file into a `Policy`, or into one error with
its line, which ``yaml_positions``, ``errors`` and ``validation_errors`` put together. ``layers`` puts one
file over another, ``reachability`` finds rules that can never match, ``lint`` what is odd about a policy that
can be used, and ``json_schema`` describes the format to editors.
"""
