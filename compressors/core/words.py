"""Finds the words of a text. A number, date, id or address is one word, with its separators, sign, unit and currency."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

Span = tuple[int, int]

_LONGEST = 256  # characters; anything longer is data, not a number or an id
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_PLAIN = re.compile(rf"[{_IDEOGRAPH}]|[^\W{_IDEOGRAPH}]+(?:['’.\-][^\W{_IDEOGRAPH}]+)*|[^\w\s]+")

_UNITS = """
    nm µm μm mm cm dm m km mi ft yd inch inches mile miles metre metres meter meters kilometre kilometres kilometer kilometers
    centimetre centimetres centimeter centimeters millimetre millimetres millimeter millimeters foot feet yards ha acre acres
    hectare hectares m² km² cm² mm² m2 km2 cm2 mm2 m³ km³ cm³ mm³ m3 cm3 sq square cubic nautical light
    ml mL cl dl l L hl litre litres liter liters gal gallon gallons pint pints barrel barrels cup cups tbsp tsp
    ng µg μg mcg mg g kg t kt Mt oz lb lbs pound pounds ounce ounces ton tons tonne tonnes gram grams kilogram
    kilograms kilo kilos
    ns µs μs ms s sec secs second seconds min mins minute minutes h hr hrs hour hours Uhr d day days week weeks month months
    year years decade decades century centuries
    km/h kmh kph mph m/s m/s² km/s ft/s kn knot knots rpm fps bps kbps Mbps Gbps Tbps kbit/s Mbit/s Gbit/s MB/s GB/s
    bit bits byte bytes B kB KB MB GB TB PB KiB MiB GiB TiB Hz kHz MHz GHz THz dB dBm dpi px pt MP
    J kJ MJ GJ cal kcal eV keV MeV GeV TeV W kW MW GW TW Wh kWh MWh GWh TWh V kV mV A mA Ah mAh Ω kΩ MΩ F µF nF pF H N kN Nm
    Pa hPa kPa MPa GPa bar mbar psi atm mmHg mol mmol M mM µM ppm ppb Bq Sv mSv lm lx cd hp PS K °C °F °K ° °N °S °E °W
    mg/l mg/L mg/dl mg/dL mmol/l mmol/L g/l g/L mg/kg kg/m² kg/m³ g/cm³
    % ‰ per percent percentage point points pct Prozent degree degrees Celsius Fahrenheit Kelvin
    k bn mn tn dozen hundred thousand lakh crore million millions billion billions trillion trillions
    Mio Mio. Mrd Mrd. Tausend Millionen Milliarden milliards
    $ ¢ £ ¥ € ₹ ₽ ₩ ₪ ₫ ₺ ₴ ₿ zł kr kr. Kč Ft lei лв Rp RM FCFA XOF XAF k€ m€ M€ Mio.€ k$ m$ M$ k£ m£ M£
    US dollar dollars cent cents euro euros Euro Euros pence penny yen yuan rupee rupees
    franc francs USD EUR GBP JPY CHF CNY RMB INR AUD CAD NZD SEK NOK DKK PLN CZK HUF RON BGN RUB UAH TRY ILS AED SAR EGP ZAR
    NGN KES BRL MXN ARS CLP COP PEN KRW TWD HKD SGD THB IDR MYR PHP VND PKR BDT BTC ETH
    B.C. A.D. am pm a.m. p.m. AM PM A.M. P.M. UTC GMT CET CEST EST EDT CST CDT MST MDT PST PDT BC AD BCE CE
"""
_MONTH = (
    "(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\.?"
)
_LABEL = "(?:[Nn]os?|Nr|Art|Sec|Figs?|Tab|Eq|Ch|[Vv]ol|pp?|Abs|Rs)"
_CURRENCY = "$¢£¤¥€₹₽₩₪₫₺₴₿￥￡"
_NUMERALS = "〇零一二三四五六七八九十百千万萬亿億兆"
_CJK_UNITS = "年月日號号時时分秒点點円圓元角万萬億亿千百十兆％%个個人名歳岁回倍度台件㎀-㏟"

_S = "[ \u00a0\u2007\u2009\u202f]"  # one space
_DIGIT = r"[\d¼-¾⅐-↉]"
_LETTER = rf"[^\W\d{_IDEOGRAPH}]"
# With accents and vowel signs up to Telugu; from Thai on there are scripts without spaces.
_MARKS = "".join(c for c in map(chr, range(0x300, 0xE00)) if unicodedata.category(c)[0] == "M")
_CHAR = rf"(?:[^\W{_IDEOGRAPH}]|[{_MARKS}])"
_RUN = rf"[^\W{_IDEOGRAPH}]{_CHAR}*+"
_END = rf"(?!{_CHAR})"

# An address ends before white space, without the punctuation at its end; its brackets are closed.
_INNER = r"(?:[^\s()<>\"“”«»]|\([^\s()]*\))"
_LAST = r"(?:[^\s()<>\"“”«»'’.,;:!?…\[\]{}*|。，、；：！？（）「」]|\([^\s()]*\))"
_ADDRESS = rf"(?:[A-Za-z][A-Za-z\d+.\-]{{1,20}}://|www\.|mailto:){_INNER}*{_LAST}"
_PATH = r"(?:(?<![^\s(\[\"“'])(?:(?:~|\.{1,2})?/|\\\\)(?=\w))"
# A folder's name may hold spaces if a backslash follows.
_FOLDERS = r"(?:[A-Za-z]:|\\)\\(?:[\w.()+\-]+(?: [\w.()+\-]+){0,4}\\)+(?=\w)"

# Between two parts of a word that touch it.
_GLUE = (
    rf"(?:://|:[\\/]|::|/\?|->|[.'’\-‐‑–−/&_@:+=#~\\^%°·\u00ad\u200c\u200d{_CURRENCY}]|\?(?=\w+=)"
    rf"|(?<=\d)[,٫٬،．，：／－—×÷*⁄⁻⁺](?=[\d+\-−¹²³⁰-⁹{_CURRENCY}])"
    r"|(?<=\w)[<>~!]=(?=\d)|,(?=[<>~!=]{1,2}\d)"  # python>=3.11,<4
    r"|(?<=[\d′'’])[\"″′](?=[\dA-Z]))"
)
_BEFORE = (
    rf"(?:[+\-−–±∓~≈<>≤≥=#№§^{_CURRENCY}]{{1,3}}\.?(?=\d)|\+/[\-−](?=\d)"
    rf"|(?<![\w'’])['’](?=\d\ds)|(?<![\w.])(?:\.(?=\d)|::(?=[\da-f]))|[@#$](?={_LETTER})|第(?=\d))"
)
_AFTER = (
    rf"(?:(?<=\d)[%％‰°′″+×{_CURRENCY}]{{1,2}}|(?<=\d)\.(?:[\-–—]{{1,2}}|\*)|(?<=[./⁄]\d)[\"″]|(?<=[./⁄]\d\d)[\"″]"
    r"|(?<=\d)[\"″](?= ?[×x] ?\d)|(?<=[×x] \d)[\"″]|(?<=[×x] \d\d)[\"″]"
    rf"|(?<=['’′]\d)[\"”″]|(?<=['’′]\d\d)[\"”″]"
    rf"|\+\+|(?<=[\da-f])::|(?<=\b[A-Z])#){_END}"
    rf"|(?<=\d)[{_CJK_UNITS}]{{1,3}}(?:\d+(?:[.,，]\d+)*[{_CJK_UNITS}]{{1,3}})*"
)
_NOTE = rf"\({_CHAR}{{1,12}}\)"  # 5(2), S0140-6736(20)30183-5, author(s)
_PART = rf"{_RUN}(?:{_AFTER})?"
# Atomic, so that a failing rest cannot cut the chunk.
_CHUNK = rf"(?>(?:{_FOLDERS}|{_BEFORE}|{_PATH})?{_PART}(?:(?:{_NOTE}{_GLUE}?|{_GLUE}{_BEFORE}?){_PART})*(?:{_NOTE})?)"

# Numbers of several chunks, with one space between them.
_GROUPS = rf"{_BEFORE}?\d{{1,3}}(?:{_S}\d{{3}})+(?:[.,]\d+)?(?:{_AFTER})?(?![\d,.\-/:]*\d|{_CHAR})"
_NUMBER = rf"(?:{_GROUPS}|(?=[^\s]{{0,8}}{_DIGIT}){_CHUNK})"
_HEAD = (
    rf"(?:{_LABEL}\.{_S}?|Rs{_S}|[A-Z]{{2,5}}{_S}"
    rf"|(?:[A-Z]{{1,3}}[{_CURRENCY}]|§§|[±∓~≈<>≤≥№§{_CURRENCY}]){_S})(?={_BEFORE}?\d)"
)
_UNIT = "|".join(map(re.escape, sorted(_UNITS.split(), key=len, reverse=True)))
_REST = (
    rf"(?:{_S}(?:{_UNIT}){_END}(?:[/·⋅⁻]+{_CHAR}{{1,6}})*"
    rf"|(?<=°){_S}[CFK]{_END}|[–—](?={_BEFORE}?\d){_NUMBER}|(?<=:\d\d){_S}[+\-−]\d\d:?\d\d{_END}"
    rf"|{_S}[±×x–—−\-/:]{_S}(?=\S{{0,3}}\d){_NUMBER}"
    rf"|,?{_S}(?=\d{{1,2}}:\d\d){_CHUNK}|{_S}(?=\d/\d|[¼-¾⅐-↉]){_CHUNK})"
)
_DAY = r"\d{1,2}(?:\.?[\-–]\d{1,2})?"
_DATES = (
    rf"{_DAY}(?:st|nd|rd|th|\.)?{_S}(?:of{_S})?{_MONTH}(?:,?{_S}[12]\d{{3}})?{_END}"
    rf"|{_MONTH}{_S}{_DAY}(?:st|nd|rd|th)?(?:,?{_S}[12]\d{{3}})?(?![\d.,:]*\d|{_CHAR})|{_MONTH},?{_S}[12]\d{{3}}{_END}"
    rf"|{_DAY}\.?{_S}(?:de{_S})?{_LETTER}{{3,10}}\.?{_S}(?:de{_S})?[12]\d{{3}}{_END}"
    rf"|{_DAY}\.{_S}\d{{1,2}}\.{_S}[12]\d{{3}}{_END}|[QH][1-4]{_S}[12]\d{{3}}{_END}"
)
_IDS = (
    rf"\+\d{{1,3}}[ \-.]?(?:\(\d{{1,5}}\)[ \-.]?)?\d+(?:[ \-./]\d{{2,}})+"  # telephone
    rf"|\(\d{{2,5}}\)[ ]?\d{{3,4}}[ \-]\d{{3,}}|\(0\d{{1,4}}\)[ ]?\d+(?:[ \-/]?\d{{2,}})*"
    rf"|\d{{3}}[ ]\d{{3}}[ ]\d{{4}}|0\d(?:[ ]\d\d){{4}}|0\d{{2,4}}[ /]\d{{3,}}(?:[ \-]?\d{{2,}})*"
    rf"|\d{{4}}(?:{_S}\d{{4}}){{3}}|97[89](?:{_S}\d{{1,7}}){{4}}"  # payment card, ISBN
    rf"|[A-Z]{{2}}\d{{2}}(?:{_S}[A-Z\d]{{4}}){{2,7}}(?:{_S}[A-Z\d]{{1,3}})?"  # IBAN
    rf"|[A-Z]{{1,3}}(?:{_S}\d{{2,4}}){{2,}}(?:{_S}[A-Z])?"
    rf"|[A-ZÄÖÜ]{{1,3}}[ \-][A-Z]{{1,2}}[ ]\d{{1,4}}[EH]?|[A-Z]{{2}}\d{{2}}{_S}[A-Z]{{3}}"  # number plates
    rf"|[A-Z]{{1,2}}\d[A-Z\d]?{_S}\d[A-Z]{{2}}|[A-Z]\d[A-Z]{_S}\d[A-Z]\d"  # postcodes
)
# Measures of two or three units, such as 6 ft 2 in.
_COMPOUND = "|".join(
    rf"\d+{_S}?(?:{first})(?:,?{_S}\d+(?:[.,]\d+)?{_S}?(?:{others}))+"
    for first, others in (
        ("ft|foot|feet", f'(?:in|inch|inches){_END}|["″”]'),
        ("['’′]", "[\"″”]|''|′′|’’"),
        ("lbs?|pounds?|st|stones?", f"(?:oz|ounces?|lbs?|pounds?){_END}"),
        ("h|hrs?|hours?|Std\\.|Stunden?", f"(?:m|mins?|minutes?|Min\\.|Minuten?|s|secs?|seconds?){_END}"),
        ("m|mins?|minutes?|Min\\.|Minuten?", f"(?:s|secs?|seconds?|Sek\\.|Sekunden?){_END}"),
        ("years?|months?|weeks?|days?", f"(?:months?|weeks?|days?|hours?){_END}"),
    )
)
_APART = rf"(?!{_GLUE}?{_CHAR}|[.,]\d|[%‰{_CURRENCY}])"
_HAN = rf"(?:(?:[{_NUMERALS}]+[{_CJK_UNITS}]){{2,}}|[{_NUMERALS}]{{2,}}[{_CJK_UNITS}]?)"
_WORD = re.compile(
    rf"(?P<address>{_ADDRESS})"
    rf"|(?:(?:{_DATES}|{_COMPOUND})|(?:{_HEAD})?(?:{_IDS}){_APART}|(?:{_HEAD})?{_NUMBER}){_REST}*"
    rf"|{_CHUNK}|{_HAN}|[{_IDEOGRAPH}]|(?:(?!{_BEFORE}|{_PATH}|{_HEAD})[^\w\s])+|[^\w\s]"
)
_DIGITS = re.compile(_DIGIT)
_WHOLE = re.compile(rf"{_DIGIT}|[{_NUMERALS}]|[@/\\_:&+#=~]")


def words(text: str) -> Iterator[Span]:
    """Yields each word, number, ideograph and run of punctuation."""
    return (span for span, _ in _words(text))


def whole_words(text: str) -> Iterator[Span]:
    """Yields the words that not even tokens may divide: numbers, dates, ids and addresses."""
    return ((a, b) for (a, b), data in _words(text) if not data and _WHOLE.search(text, a, b))


def numbers(text: str) -> Iterator[Span]:
    """Yields the words with a digit."""
    return ((a, b) for a, b in words(text) if _DIGITS.search(text, a, b))


def plain_words(text: str, start: int = 0, end: int | None = None) -> Iterator[Span]:
    """Yields words and runs of punctuation; a number ends at any separator but a point, a hyphen or an apostrophe."""
    return (found.span() for found in _PLAIN.finditer(text, start, len(text) if end is None else end))


def _words(text: str) -> Iterator[tuple[Span, bool]]:
    """Words, and whether each is a part of data that is too long for a number or an id."""
    for found in _WORD.finditer(text):
        if found["address"] or found.end() - found.start() <= _LONGEST:
            yield found.span(), False
        else:
            yield from ((part, True) for part in plain_words(text, *found.span()))
