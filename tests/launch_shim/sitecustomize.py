"""On the path of launched tests: makes the processes that a launcher has started take the CPU for a device."""

import os

if "LOCAL_RANK" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "false") != "true":
    from tests.accelerate_worlds import as_device, without_builds

    as_device()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        without_builds()
