"""What a run writes down beside its checkpoints."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from fmjax.harness import records


@pytest.fixture
def no_cache():
    """As in a user's process: the tests themselves share a cache."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    for name, value in zip(names, (None, 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_compiled_programs_are_kept_in_the_run_folder(tmp_path, no_cache):
    with records.compiled_in(tmp_path / "compiled"):
        jax.jit(lambda x: jnp.sin(x) + 17)(jnp.ones(3)).block_until_ready()
    assert list((tmp_path / "compiled").iterdir())
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_a_users_own_cache_is_left_alone(tmp_path, no_cache):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with records.compiled_in(tmp_path / "compiled"):
        jax.jit(lambda x: jnp.sin(x) + 18)(jnp.ones(3)).block_until_ready()
    assert list((tmp_path / "own").iterdir()) and not (tmp_path / "compiled").exists()
