"""Figures that PaliGemma's authors report, by task and model with its resolution.

Of PaliGemma: the table of transfers in big_vision's README (validation or test as there); of
PaliGemma 2: Table 13 of arXiv 2412.03555, means of five runs, and Table 11 for detection. All are
of models fine-tuned for the task, but where `notes` of the benchmark says otherwise.
"""

_PALIGEMMA = ("paligemma-3b-224", "paligemma-3b-448", "paligemma-3b-896")
_PALIGEMMA2 = tuple(
    f"paligemma2-{size}-{resolution}" for resolution in (224, 448) for size in ("3b", "10b", "28b")
)


def _row(first: str, second: str = "") -> dict[str, float]:
    """Of PaliGemma at 224, 448, 896; and of PaliGemma 2 3B, 10B, 28B at 224 and then at 448."""
    pairs = [*zip(_PALIGEMMA, first.split(), strict=False)]
    pairs += [*zip(_PALIGEMMA2, second.split(), strict=False)]
    return {model: float(value) for model, value in pairs if value != "-"}


PUBLISHED: dict[str, dict[str, float]] = {
    "vqav2": _row("83.19 85.64", "83.0 84.3 84.5 84.8 85.8 85.8"),
    "textvqa": _row("55.47 73.15 76.48", "59.6 64.0 64.7 75.2 76.6 76.2"),
    "okvqa": _row("63.54 63.15", "64.2 68.0 71.2 64.1 68.6 70.6"),
    "aokvqa-da": _row("61.85 63.22", "64.2 68.9 70.2 67.9 70.8 71.2"),
    "aokvqa-mc": _row("76.37 76.90", "79.7 83.7 84.7 82.5 85.9 87.0"),
    "vizwizvqa": _row("73.7 75.52", "76.4 78.1 78.7 77.5 78.6 78.9"),
    "ai2d": _row("72.12 73.28", "74.7 83.1 83.2 76.0 84.4 84.6"),
    "gqa": _row("65.61 67.03", "66.2 67.2 67.3 68.1 68.3 68.3"),
    "xgqa": _row("58.37 59.07", "58.6 61.4 61.1 60.4 62.6 62.1"),
    "nlvr2": _row("90.02 88.93", "91.4 93.9 94.2 91.6 93.7 94.1"),
    "marvl": _row("80.57 76.78", "83.5 89.5 90.6 82.7 89.1 89.7"),
    "ocrvqa": _row("73.24 75.60 75.90", "73.4 74.7 75.3 75.7 76.3 76.6"),
    "scienceqa": _row("95.39 95.93", "96.1 98.2 98.2 96.2 98.5 98.6"),
    "rsvqa-lr": _row("92.65 93.11", "93.0 92.8 93.5 92.7 93.1 93.7"),
    "rsvqa-hr": _row("92.61 92.79", "92.7 92.6 92.7 92.8 92.8 92.8"),
    "chartqa": _row("57.08 71.36", "58.2 61.3 57.85 71.6 78.25 73.2"),
    "docvqa": _row("43.74 78.02 84.77", "39.9 43.9 44.9 73.6 76.6 76.1"),
    "infovqa": _row("28.46 40.47 47.75", "25.2 33.6 36.4 37.5 47.8 46.7"),
    "stvqa": _row("63.29 81.82 84.40", "61.9 64.3 65.1 80.5 82.0 81.8"),
    "tallyqa": _row("69.56 72.27", "70.3 73.4 74.2 73.6 76.7 76.8"),
    "countbenchqa": _row("81.9 83.1", "81.0 84.0 86.4 82.0 85.3 87.4"),
    "mmvp": _row("47.33 45.33"),
    "pope": _row("85.98 86.97"),
    "cococap": _row("141.92 144.60", "141.3 143.7 144.0 143.4 145.0 145.2"),
    "nocaps": _row("121.72 123.58", "123.1 126.3 127.1 123.5 126.9 127.0"),
    "textcaps": _row("127.48 153.94", "127.5 137.9 139.9 152.1 157.7 153.6"),
    "scicap": _row("162.25 181.49", "165.1 159.5 156.9 183.3 177.2 172.7"),
    "screen2words": _row("117.57 119.59", "113.3 117.8 122.8 114.0 119.1 123.4"),
    "widgetcap": _row("136.07 148.36", "138.1 139.8 138.8 151.4 151.9 148.9"),
    "xm3600": _row("41.3 41.9", "42.8 44.5 45.2 43.2 44.6 45.2"),
    "coco35l": _row("115.8 118.0", "113.9 115.8 116.5 115.8 117.2 117.2"),
    "msrvtt-cap": _row("70.54", "68.5 72.1 -"),
    "activitynet-cap": _row("34.62", "34.2 35.9 -"),
    "vatex-cap": _row("79.73", "80.8 82.7 -"),
    "msvd-qa": _row("60.22", "61.1 62.5 -"),
    "msrvtt-qa": _row("50.09", "50.5 51.9 -"),
    "activitynet-qa": _row("50.78", "51.3 53.2 -"),
    "refcoco": _row("73.40 75.57 76.94", "73.4 75.9 75.0 76.3 78.2 77.3"),
    "refcoco+": _row("68.32 69.76 72.18", "68.6 72.0 70.3 72.1 74.4 72.8"),
    "refcocog": _row("67.65 70.17 72.22", "68.3 71.4 70.5 72.3 74.4 73.0"),
    "detection": _row("28.7 37.0 41.1", "30.4 30.3 - 38.5 39.2 -"),
}
