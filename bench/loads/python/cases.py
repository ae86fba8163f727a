"""Computations of one kind each; what they print depends on nothing but their code."""

import hashlib
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction


def numbers(seed, count):
    """Pseudo-random numbers of 31 bits."""
    for _ in range(count):
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        yield seed


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def do_json():
    data = [{"id": n, "name": f"item {n:x}", "tags": [n % 7, n % 11, None, True], "weight": n / 7}
            for n in numbers(1, 6000)]
    for _ in range(6):
        text = json.dumps(data, sort_keys=True, indent=1)
        data = json.loads(text)
    print(len(text), digest(text))


def do_regex():
    text = " ".join(f"user{n % 997}@host{n % 31}.example.org {n:08x} 2024-{n % 12 + 1:02}-{n % 28 + 1:02}"
                    for n in numbers(2, 40000))
    hosts = Counter(re.findall(r"[\w.]+@([\w.]+)\.org", text))
    dates = Counter(re.findall(r"(\d{4})-(0[1-9]|1[0-2])-(\d\d)\b", text))
    hexes = re.sub(r"\b([0-9a-f]{4})([0-9a-f]{4})\b", r"\2-\1", text)
    words = re.split(r"[^a-z]+", hexes)
    print(hosts.most_common(3), dates.most_common(2), digest(hexes), len(words))


def do_queens(size=8):
    def place(row, columns, rising, falling):
        if row == size:
            return 1
        count = 0
        for column in range(size):
            if column not in columns and row + column not in rising and row - column not in falling:
                count += place(row + 1, columns | {column}, rising | {row + column}, falling | {row - column})
        return count
    print([place(0, frozenset(), frozenset(), frozenset()) for _ in range(15)])


def do_dicts():
    counts = {}
    for n in numbers(3, 700000):
        key = str(n % 20011)
        counts[key] = counts.get(key, 0) + n
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    print(ordered[:3], ordered[-1], digest(repr(ordered)))


def do_floats():
    x, y, z, total = 0.1, 0.0, 0.0, 0.0
    for step in range(700000):
        x, y, z = x + 0.01 * 10 * (y - x), y + 0.01 * (x * (28 - z) - y), z + 0.01 * (x * y - 8 / 3 * z)
        total += math.sin(x) * math.sqrt(abs(y)) + math.atan2(y, z) + math.exp(-abs(z))
    print(x.hex(), y.hex(), z.hex(), repr(total))


def do_bignum():
    a, b = 1, 1
    for _ in range(30000):
        a, b = b, a + b
    power = pow(3, 1 << 14) % (10 ** 4000 + 7)
    series = sum((Fraction(1, n * n) for n in range(1, 400)), Fraction())
    print(digest(hex(a)), digest(hex(power)), digest(hex(series.numerator)), pow(b, power, (1 << 2203) - 1) % 10**20)


@dataclass(frozen=True, order=True)
class Point:
    x: int
    y: int

    def turned(self):
        return Point(-self.y, self.x)


def do_objects():
    points = [Point(n % 1000, n // 1000 % 1000) for n in numbers(4, 40000)]
    for _ in range(3):
        points = sorted({point.turned() for point in points})
    try:
        points[0].x = 1
    except AttributeError as error:
        print(type(error).__name__, error)
    print(len(points), points[0], points[-1], sum(point.x * point.y for point in points))


globals()["do_" + sys.argv[1]]()
