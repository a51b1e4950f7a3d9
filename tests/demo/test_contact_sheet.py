"""The contact sheet draws scenes and pairs."""

from pathlib import Path

import pytest
from PIL import Image

from checkpoints.training import data as contact_sheet


@pytest.mark.parametrize("extra", [[], ["--pairs"], ["--no-boxes"]])
def test_sheet_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str]):
    target = tmp_path / "sheet.png"
    monkeypatch.setattr("sys.argv", ["contact_sheet", str(target), "--count", "3", *extra])
    contact_sheet.main()
    with Image.open(target) as sheet:
        assert sheet.mode == "RGB" and sheet.height > 112
