# Copyright 2026 The tocom-hf authors. Licensed under the Apache License, Version 2.0.
"""A service that merges more tokens when the load rises: in one process or several, or on a cluster with Ray Serve.

The policy is all that is imported here, and it needs neither torch nor a web framework.
"""

from tocom_hf.serving.policy import DegreePolicy


__all__ = ["DegreePolicy"]
