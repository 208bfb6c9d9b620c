"""lm-eval keeps the data sets that it reads; here, in a folder of the tests' own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.lm_eval_tasks import write_lm_eval_tasks


@pytest.fixture(scope="module")
def tiny_tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of lm-eval tasks."""
    import datasets  # type: ignore[import-untyped]

    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
        yield write_lm_eval_tasks(tmp_path_factory.mktemp("lm-eval") / "tasks")
