"""What a question asks for: its content words, and the kind of answer it expects."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache


@dataclass(frozen=True)
class Kind:
    """A kind of answer.

    Args:
        name: key of its weights.
        cue: what questions for it say.
        value: what answers look like; matches nothing where the look says nothing.
        examples: answers, to compare lines with by meaning.
    """

    name: str
    cue: re.Pattern[str]
    value: re.Pattern[str]
    examples: tuple[str, ...] = ()


def _kind(name: str, cue: str, value: str = r"(?!)", *examples: str) -> Kind:
    return Kind(name, re.compile(cue, re.I), re.compile(value, re.I), examples)


_MONTH = r"(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}"
_MONEY = r"(?<![\d.,])[-(]?\d{1,3}([ ,.']?\d{3})*\s?[.,]\s?\d{2}(?!\d|[./-]\d)|(rm|[$€£¥₹]|usd|eur|gbp|myr)\s?\d"
# The first kind whose cue is in the question counts: "the address of the company" asks for an address.
KINDS = (
    _kind("date", r"\b(dates?|dated|day|when|year|month)\b",
          rf"\b\d{{1,4}}\s?[./-]\s?\d{{1,2}}\s?[./-]\s?\d{{2,4}}|\b\d{{1,2}}(st|nd|rd|th)?[\s.,'/-]*{_MONTH}\b|"
          rf"\b{_MONTH}[\s.,'-]*\d{{1,4}}|(?<!\d)(19|20)\d{{6}}(?!\d)|\b(19|20)\d\d\b",
          "25/12/2018", "date: 3 March 2017", "2018-06-17 14:07:29"),
    _kind("time", r"\b(times?|hours?|o'?clock)\b", r"\b\d{1,2}\s?:\s?\d{2}|\b\d{1,2}\s?[ap]\.?m\b", "time: 14:07:29", "8:30 pm"),
    _kind("contact", r"\b(tele)?(phone|fax|mobile)\b|\btel\b|\be-?mail\b|\bweb ?site\b|\burl\b",
          r"\+?\(?\d[\d\s()/-]{6,}\d|@|\bwww\b|\bhttps?:|\w\.(com|org|net|gov|edu)\b",
          "tel: 03-7781 8333", "fax 555-0199", "info@mail.com", "www.shop.com"),
    _kind("share", r"\bper ?cent(age)?\b|%|\brate\b", r"\d\s?%", "6 %"),
    _kind("address", r"\b(address(es)?|where|locat(ed|ion)|street|city|town|zip|post(al)? ?code)\b",
          r"\b(lot|unit|block|blk|street|st|road|rd|avenue|ave|lane|drive|blvd|highway|hwy|way|court|square|level|lvl|floor|flr|suite|"
          r"basement|building|tower|plaza|mall|centre|center|house|phase|section|park|p\.? ?o\.? ?box|jln|lorong|persiaran|lebuh\w*|taman|"
          r"tmn|bandar|kampung|kg|wisma|menara|bangunan|pusat|kompleks|kawasan|seksyen|tingkat|darul)\b\.?|jalan|"
          r"\bno\.?\s?\d{1,3}[a-z]?\b|(?<![\w/-])\d{5}(?![\d/-])|#\d+-\d+|\b[a-z]\d*-[a-z\d]+-\d+",
          "No. 12, Jalan Bukit 3/4, Taman Indah", "221 Baker Street, London", "40150 Shah Alam, Selangor",
          "Suite 5, Main Road, Springfield, IL 62704", "Kawasan Perindustrian, 81200 Johor Bahru, Johor"),
    _kind("number", r"\b(numbers?|no|id|code|count|quantity|qty|how many)\b|#", r"\d", "no: 00550388"),
    _kind("total", r"\btotal\b(?! (number|quantity|qty|items?|tax|gst|discount))|\bgrand\b|\boverall\b|\b(amount|balance) (due|payable)\b|"
          r"\bhow much (was|is|were|did|does|do)\b.*\b(paid|pay|spen[dt]|cost|bill|all|owed?)\b|\b(bill|amount|sum)\b.*\bpaid\b|\bsum\b",
          _MONEY, "total 12.50"),
    _kind("amount", r"\b(amounts?|prices?|costs?|how much|paid|pay|balance|change|tax|gst|vat|fees?|cash|discount|subtotal|rounding|"
          r"charges?|salary|budget|revenue|worth|value)\b", _MONEY, "price 12.50"),
    _kind("name", r"\b(company|compan(y|ies)|stores?|shops?|business|merchant|restaurant|vendor|seller|supplier|issue[dr]s?|"
          r"organi[sz]ation|firm|retailer|hotel|agency|university|brand|title|heading|header)\b",
          r"\b(sdn|bhd|ltd|limited|inc|llc|llp|plc|corp|gmbh|co|company|enterprise|trading|restaurant|restoran|store|stationery|"
          r"mart|hardware|shop|cafe|hotel|bakery|bank|university|institute)\b|s/b\b",
          "Unihakka International Sdn Bhd", "ABC Trading Company Ltd", "Green Leaf Restaurant", "Super Mart Enterprise",
          "Hardware Store"),
)  # fmt: skip
OTHER = _kind("other", r"")

_STOP = frozenset(
    """a an the is are was were be been am do does did has have had of in on at by for from to with and or as this that these
    those it its there here what which who whom whose when where why how much many please tell me you your can could given
    shown show shows mentioned written printed stated listed document image picture photo page form receipt invoice bill
    according name value number amount s""".split()
)
_WORD = re.compile(r"[^\W\d_]+|\d+", re.U)


@dataclass(frozen=True)
class Question:
    """A question as the ranking sees it: kind of its answer, content words in lower case."""

    text: str
    kind: Kind
    words: tuple[str, ...]

    @staticmethod
    def of(text: str) -> Question:
        """Read a question; the words a question always has are left out."""
        kind = next((kind for kind in KINDS if kind.cue.search(text)), OTHER)
        every = words_of(text)
        content = [word for word in every if word not in _STOP] or every
        return Question(text, kind, tuple(dict.fromkeys(content)))


def words_of(text: str) -> list[str]:
    """Words and digit groups in lower case, any script."""
    return _WORD.findall(text.casefold())


@lru_cache(maxsize=1 << 16)
def alike(one: str, other: str) -> float:
    """How far two words are the same, in [0, 1]: forgives endings, words run together and single misread letters."""
    if one == other:
        return 1.0
    short, long = sorted((one, other), key=len)
    if len(short) >= 4 and short in long:
        return 0.9 if long.startswith(short) else 0.7
    if len(short) < 4 or len(long) - len(short) > 2:
        return 0.0
    ratio = SequenceMatcher(None, short, long, autojunk=False).ratio()
    return 0.8 * ratio if ratio >= 0.8 else 0.0
