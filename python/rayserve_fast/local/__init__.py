"""Local testing mode: `serve.run(app, _local_testing_mode=True)` runs an application in the calling process.

No Ray, no sockets, no pickled code: a test patches what the deployments use, steps into them and fails in a second.
What is the same as on a cluster is the same code: handles and responses (`rayserve_fast.handle`), how values and errors
travel (`rayserve_fast.values`), methods and their results (`replica.calls`), the user's object and its loop
(`replica.servable`, `replica.loop`). What is made anew is only what lies between: a call that waits for its slot and
is run (`call`, `replica`), the applications of the process (`applications`), and building them (`build`).

Left out: HTTP, more than one replica, scaling, and everything that is about processes.
"""

from rayserve_fast.local.applications import Applications, applications
from rayserve_fast.local.call import LocalCall

__all__ = ["Applications", "LocalCall", "applications"]
