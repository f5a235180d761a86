"""Lets vLLM's V2 model runner run on a CPU: its Triton kernels in Triton's own interpreter (TRITON_INTERPRET=1).

vLLM's CPU build looks for a Triton backend named ``cpu`` and takes V2 where it finds one. With the interpreter no
backend compiles anything, so any stands in. Everything else is the real V2 runner. Only tests put this on PYTHONPATH.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.backends import backends

    known = backends["nvidia"]

    class AlwaysActive(known.driver):
        @staticmethod
        def is_active() -> bool:
            return True

    backends["cpu"] = type(known)(compiler=known.compiler, driver=AlwaysActive)
