# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""The environment of the tests, to be imported before huggingface_hub, which reads it on import."""

import os
import socket


# the port of the tests' own Hub; it answers where a test starts it, see hub_server.py
HUB_LISTENER = socket.create_server(("127.0.0.1", 0))
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{HUB_LISTENER.getsockname()[1]}"
os.environ["HF_HUB_DISABLE_XET"] = "1"  # that Hub speaks Git LFS, the other protocol of the client
os.environ.setdefault("HF_HUB_OFFLINE", "1")
