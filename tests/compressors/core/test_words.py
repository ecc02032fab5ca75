"""Numbers, dates, ids and addresses are one word, at every level and around every match that must stay."""

from __future__ import annotations

import time
from datetime import UTC

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nutgraf.compressors.core.keep import keep_spans
from nutgraf.compressors.core.units import LEVELS, carve, split_units
from nutgraf.compressors.core.words import words

WHOLE = """
1,234,567 | $12,345.67 | −3.5 °C | ±0.5 | +/-0.5 | ~$5 | US$ 12.50 | EUR 12.50 | 12,50 € | €12,50 | 12'000
CHF 12’000 | 1 234 567,89 km | 5%-10% | $5-$10m | 50 % | <5% | ≥ 5 | 1.234.567,89 EUR | ₹1,23,456 | .5 mm | 1.5e-3
6.02×10²³ | 10⁻³ | 3 × 4 cm | 1 1/2 | 5'10" | 12.5 km/h | 3 million | $1.2 billion | 100 km² | 5 per cent | -40 °F
2019-05-03 | 2019-05-03T12:00:00+02:00 | 2019-05-03 12:00 | 03.05.2019 | 5/3/19 | March 5, 2021 | 5 March 2021
3. Oktober 1990 | 14 juillet 1789 | 3 de mayo de 2019 | May 2019 | 12:30 p.m. | 12:30:45.678Z | 5 pm | 1990–1995
1990 - 1995 | 1990—1995 | 1990s | pp. 5–7 | AB-123/45 | B-MW 1234 | AB12 CDE | 7ABC123 | SW1A 1AA
DE89 3704 0044 0532 0130 00 | 4111 1111 1111 1111 | 978-3-16-148410-0 | 550e8400-e29b-41d4-a716-446655440000
00:1A:2B:3C:4D:5E | 2001:db8::1 | 192.168.0.1:8080 | 10.0.0.0/24 | v1.2.3-beta+build.5 | CVE-2021-44228
ISO 9001:2015 | arXiv:2310.05736 | No. 5 | § 12a | #123 | @user | #tag | C++ | C# | AT&T
10.1016/S0140-6736(20)30183-5 | jane.doe+x@mail.example.co.uk | https://a.example/wiki/Foo_(bar)?x=1&y=2#z
www.example.com/path | http://a.example/?q=1,2;3 | example.com/a-b?c=d | /usr/local/bin | C:\\Users\\x
+49 30 1234567 | +1 (555) 123-4567 | 555 123 4567 | 52°31'12"N | 2019年5月3日 | １，２３４ | x86_64 | COVID-19 | A&B-12_c.txt
12% | 0x1F | 16:9 | 5 µg/ml | 5 kg·m/s² | 1,5e−3 | Rs 500 | ISBN 978 3 16 148410 0 | 24. 12. 2019 | 1.–3. Mai 2020
5'11" | 6 ft 2 in | 5′ 11″ | 5' 11" | 6ft 2in | 6 feet 2 inches | 5 lb 3 oz | 3 h 20 min | 2 hours, 5 minutes | 1h30m
5 years 2 months | 2.5" | 3/4" | 12" × 8" | 100 000 $ | 5 m€ | 300 kr. | 1 000 000 FCFA | 500 Ft | 100.- | CHF 12.–
12.-- € | 1.5 Mio. € | 20 billion US dollars | 2019-05-03 12:00:00.123 UTC | 2019-05-03 12:00 +02:00 | 20190503T120000Z
2019-W18-5 | 1.0.0-rc.1+build.5 | python>=3.11,<4 | ~=2.0 | 1.2.* | torch==2.13.0 | user%tag@mail.example | a.b-c_d@x-y.co
C:\\Program Files\\a b.c\\x.txt | \\\\server\\share\\file.txt | ../x/y_z-1.tar.gz | ~/notes/2019.md | src/main/A.java:42
s3://bucket/key/part-0001.parquet | 25° C | 5 °C–8 °C | $5 million–$7 million | §§ 5–7 | '90s | 2× | 0.25 €/km
44 B.C. | Q1 2020 | 三万五千円 | 二〇一九年五月三日 | 100㎡ | ::1
"""
EXAMPLES = [one.strip() for line in WHOLE.strip().split("\n") for one in line.split("|")]

digits = st.text("0123456789", min_size=1, max_size=4)
letters = st.text("abcXYZ", min_size=1, max_size=4)
number = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "+", "-", "−", "±", "$", "€", "-$", "~", "<"]),
    st.integers(0, 10**9).flatmap(
        lambda n: st.sampled_from([f"{n}", f"{n:,}", f"{n:,}".replace(",", "."), f"{n:,}".replace(",", "'")])
    ),
    st.sampled_from(["", ".5", ",25", ".000"]),
    st.sampled_from(["", "%", " %", " km", " kg", "°", " °C", " €", " USD", "€", "k", " million", " m/s"]),
)
spaced = st.builds("{:,}{}".format, st.integers(1000, 10**9), st.sampled_from(["", " km", " €"])).map(
    lambda s: s.replace(",", " ")
)
date = st.dates().flatmap(lambda d: st.sampled_from([d.isoformat(), f"{d:%d.%m.%Y}", f"{d:%m/%d/%y}", f"{d:%Y%m%d}"]))
moment = st.datetimes().map(lambda t: t.isoformat()) | st.times().map(lambda t: f"{t:%H:%M}")
span = st.builds("{}{}{}".format, digits, st.sampled_from(["-", "–", "—", "/", ":", "x", "×", " – "]), digits)
ident = (
    st.lists(letters | digits, min_size=2, max_size=5)
    .flatmap(
        lambda parts: st.lists(st.sampled_from("-_/.:#+&"), min_size=len(parts), max_size=len(parts)).map(
            lambda marks: "".join(p + m for p, m in zip(parts, marks))[:-1]
        )
    )
    .filter(lambda one: any(c.isdigit() for c in one))
)
email = st.builds(
    "{}.{}+{}@{}.{}".format, letters, letters, digits, letters, st.sampled_from(["com", "co.uk", "example"])
)
url = st.builds(
    "{}://{}.example:{}/{}?{}={}&x=%20#{}".format,
    st.sampled_from(["http", "https", "s3"]),
    letters,
    digits,
    letters,
    letters,
    digits,
    letters,
)
height = st.tuples(st.integers(1, 9), st.integers(0, 11)).flatmap(
    lambda t: st.sampled_from(["{}'{}\"", "{}′{}″", "{} ft {} in", "{}ft {}in", "{} feet {} inches", "{}' {}\""]).map(
        lambda form: form.format(*t)
    )
)
price = st.builds(
    "{}{} {}".format,
    st.integers(1, 10**7).flatmap(lambda n: st.sampled_from([f"{n}", f"{n:,}", f"{n:,}".replace(",", ".")])),
    st.sampled_from(["", ".50", ",99"]),
    st.sampled_from(
        ["EUR", "USD", "€", "$", "zł", "kr.", "Ft", "FCFA", "m€", "euros", "million dollars", "billion yen"]
    ),
)
stamp = st.datetimes(timezones=st.just(UTC)).flatmap(
    lambda t: st.sampled_from([t.isoformat(), t.isoformat(" "), f"{t:%Y-%m-%d %H:%M} +02:00", f"{t:%Y%m%dT%H%M%SZ}"])
)
version = st.builds(
    "{}{}.{}.{}{}".format,
    st.sampled_from(["", "v", ">=", "~=", "==", "^"]),
    *[st.integers(0, 99)] * 3,
    st.sampled_from(["", "-rc.1", "+build.5", "b2", ".post1", "-SNAPSHOT"]),
)
path = st.builds(
    "{}{}{}".format,
    st.sampled_from(["/", "./", "../", "~/", "C:/"]),
    st.lists(letters | digits | st.just("a_b-1"), min_size=1, max_size=4).map("/".join),
    st.sampled_from(["", ".py", ".tar.gz", "/x.md:12"]),
) | st.builds(
    "{}{}{}".format,
    st.sampled_from(["C:\\", "\\\\server\\"]),
    st.lists(letters | st.just("Program Files"), min_size=1, max_size=4).map("\\".join),
    st.sampled_from(["\\x.txt", "\\a_1"]),
)
things = (
    height
    | price
    | stamp
    | version
    | path
    | number
    | spaced
    | date
    | moment
    | span
    | ident
    | email
    | url
    | st.ip_addresses().map(str)
    | st.uuids().map(str)
)
around = st.sampled_from(
    [
        ("The rate was ", " in all."),
        ("", ""),
        ("(", ")"),
        ("He paid “", "”, then left."),
        ("It is ", "."),
        ("so: ", "; and\n"),
    ]
)


@pytest.mark.parametrize("one", EXAMPLES)
def test_a_number_date_id_or_address_is_one_word(one):
    text = f"it was ({one}), so {one}."
    assert [text[a:b] for a, b in words(text)] == ["it", "was", "(", one, "),", "so", one, "."]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(one=things, around=around, tokens=st.integers(1, 3), cut=st.tuples(st.integers(0, 99), st.integers(1, 9)))
def test_nothing_divides_it(one, around, tokens, cut):
    text = one.join(around)
    start = len(around[0])
    inside = set(range(start + 1, start + len(one)))
    offsets = [(i, min(i + tokens, len(text))) for i in range(0, len(text), tokens)]
    a = start + cut[0] % len(one)
    part = text[a : min(a + cut[1], start + len(one))]
    kept = keep_spans(text, [part] if part.strip() else [], kinds=["numbers", "names"])
    for level in LEVELS:
        units = split_units(text, level, offsets)
        carved, _, _ = carve(units, kept, text)
        assert not inside & {i for unit in [*units, *carved] for i in unit}


def test_a_match_keeps_its_whole_word():
    text = "On 2019-05-03 Ann paid 12,345.67 € to bob@shop.example for sediment."
    for keep, want in {
        "345": "12,345.67 €",
        "shop": "bob@shop.example",
        "-05": "2019-05-03",
        "sedi": "sediment",
    }.items():
        assert [text[a:b] for a, b in keep_spans(text, [keep])] == [want]
    assert [text[a:b] for a, b in keep_spans(text, patterns=[r"\d{4}", r"\bt", r"3\d"])] == [
        "2019-05-03",
        "12,345.67 €",
        "to",
    ]


def test_plain_words_and_lists_are_divided_as_before():
    text = "Rivers, e.g. the Nile (6,650 km) and “the Amazon”; 1, 2, 3 and/or 4. In 2019, 300 people; a—b हिन्दी café"
    assert " | ".join(text[a:b] for a, b in words(text)) == (
        "Rivers | , | e.g | . "
        "| the | Nile | ( | 6,650 km | ) | and | “ | the | Amazon | ”; | 1 | , | 2 | , | 3 | and/or | 4 | ."
        " | In | 2019 | , | 300 | people | ; | a | — | b | हिन्दी | café"
    )


def test_data_is_no_number():
    text = "1,2;" + "1,2,3," * 200
    assert max(b - a for a, b in words(text)) < 9
    tokens = [(i, i + 1) for i in range(len(text))]
    assert len(split_units(text, "token", tokens)) > 1000
    link = "https://a.example/" + "x1" * 400
    assert list(words(link)) == [(0, len(link))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "odd",
    [
        "1,",
        "a1-",
        "(",
        "http://(",
        "5 km ",
        "1 x ",
        "12 345 ",
        "+-",
        "A1 ",
        "5(2)",
        "日1",
        "a@",
        "5' ",
        "5 ft 2 ",
        "C:\\a ",
        "5.-",
        ">=1,",
    ],
)
def test_odd_texts_take_linear_time(odd):
    began = time.perf_counter()
    list(words(odd * (100_000 // len(odd))))
    assert time.perf_counter() - began < 5
