"""vLLM as the engine: HOPE as an out-of-tree model with sessions in vLLM's paged cache. Only this package imports it.

plugin.py     what vLLM's plugin loader calls in every process: model and config format are registered
model.py      the model; its sessions' states are blocks of vLLM's mamba cache
connector.py  the KV connector: moves a session's state into a block before a request and out after it
supported.py  which models it can serve (no vLLM import)
mailbox.py    how states travel between nested-serve and vLLM's engine process (no vLLM import)
backend.py    the Backend behind `nested-serve --backend vllm`
"""
