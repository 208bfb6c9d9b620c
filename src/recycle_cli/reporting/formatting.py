"""How numbers are written: the one place that rounds."""

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
NARROW = 0.001

Interval = tuple[float, float]


def percent(share: float) -> str:
    """A share as in `61.2 %`."""
    return f"{_tenths(100 * share)} %"


def percent_interval(interval: Interval) -> str:
    """An interval of shares as in `58.1 to 66.0 %`."""
    low, high = interval
    return f"{_tenths(100 * low)} to {_tenths(100 * high)} %"


def points(difference: float) -> str:
    """A difference of shares in percentage points, signed, as in `+2.1`."""
    return _signed(_tenths(100 * difference))


def points_interval(interval: Interval) -> str:
    """An interval of differences in percentage points, as in `-0.3 to +4.5`."""
    low, high = interval
    return f"{points(low)} to {points(high)}"


def p_value(value: float) -> str:
    """A p-value as in `0.031`, `0.27` or `< 0.001`."""
    if value < NARROW:
        return f"< {NARROW}"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def score(value: float | None) -> str:
    """A selection score or a loss, whose scale is the method's own."""
    return NOTHING if value is None else f"{value:.4g}".replace("-", MINUS)


def seconds(duration: float) -> str:
    """A duration as in `0.4 s`, `3 min 20 s` or `2 h 05 min`."""
    if duration < 10:
        return f"{duration:.1f} s"
    whole = round(duration)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def size(count: int) -> str:
    """An amount of memory as in `1.3 GB`; nothing measured is a dash."""
    if count <= 0:
        return NOTHING
    amount = float(count)
    for unit in ("bytes", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}"
        amount /= 1000
    return f"{amount:,.1f} GB"


def counted(count: int, noun: str) -> str:
    """A number with its noun, as in `1 task` or `45 tasks`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(words: list[str]) -> str:
    """Words as in `a, b and c`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def shortened(text: str, limit: int) -> str:
    """A name on one line with its middle left out where it is too long: both ends tell names
    apart."""
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    tail = (limit - 1) // 2
    return f"{line[: limit - 1 - tail]}\N{HORIZONTAL ELLIPSIS}{line[len(line) - tail :]}"


def _tenths(value: float) -> str:
    # Adding zero turns the -0.0 that rounding can leave into 0.0.
    return f"{round(value, 1) + 0.0:.1f}".replace("-", MINUS)


def _signed(text: str) -> str:
    return text if text.startswith(MINUS) or text == "0.0" else f"+{text}"
