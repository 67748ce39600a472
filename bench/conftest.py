"""`pytest bench/` measures models; what measures mpscale itself takes long and is collected only when it is named."""

from pathlib import Path

import pytest

SELFCHECK = Path(__file__).parent / "selfcheck"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if SELFCHECK not in (collection_path, *collection_path.parents):
        return None
    named = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
    return None if any(SELFCHECK in (path, *path.parents) for path in named) else True
