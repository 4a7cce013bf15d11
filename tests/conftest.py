"""Eight host devices, whole float32 products, no rank promotion by itself, one compilation cache.

The cache is shared by the workers and by the processes that tests start, and goes when they have
ended. It holds every program, small ones too: many tests compile the same ones.

A worker keeps what its tests have traced, millions of objects, which are not looked through for
garbage again: a command of `fmjax.harness` calls `gc.collect()` at its end.
"""

import atexit
import gc
import os
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a worker inherits its parent's
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="fmjax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# A GPU would round the factors of float32 products to ten bits, which no closed form survives.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.hookimpl(trylast=True)  # when the file's fixtures are gone
def pytest_runtest_teardown(item, nextitem):
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()
