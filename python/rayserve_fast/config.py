"""The configuration classes of `ray.serve.config`.

`DeploymentConfig`, the plain value that they all end up in, is `rayserve_fast.controlplane.spec`'s: processes that only
read it import it from there and pay for nothing else.
"""

from rayserve_fast.controlplane.spec import DeploymentConfig

__all__ = ["DeploymentConfig"]
