"""SGLang's HiCache on the virtual device: its own cache, pools and transfers, and a model of its scheduler.

SGLang's code decides what is launched, on which stream, behind which event; nothing here repeats it. What has
no CPU form is replaced below that: ``machine`` puts the virtual device where SGLang reaches for CUDA,
``kernels`` stands for its copy kernels, ``forward`` for the model. ``cache`` builds SGLang's radix cache with
its pools and controller, ``scheduler`` does what SGLang's overlap loop does to them (``loops``,
``speculative`` and ``decode_server``: what others do; ``modes`` names them), ``workload`` makes up requests,
``experiment`` runs seeds and collects races and wrong bytes.
"""
