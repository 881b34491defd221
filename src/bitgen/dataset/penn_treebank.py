"""Words of captions as the COCO caption evaluation sees them, without Java.

The COCO evaluation (pycocoevalcap) splits captions by Stanford CoreNLP 3.4.1's `PTBTokenizer`, with
`-preserveLines -lowerCase`, and drops punctuation. Scores depend on it: "it's" is two words, "T.V."
is one, "black-and-white" is one. That tokenizer is a Java program, a lexer of some seventy rules:
the longest match wins and, among matches of one length, the first rule. Here are those rules as
regular expressions, for computers that have no Java. Tests compare both on every caption of COCO
that is there; what is known to differ is named in docs/evaluation.md.

A rule is a body, which becomes the word, and what must follow it, which counts for the length of
the match and is read again. As in the lexer, letters in classes are of the case that is written,
and literal words of either case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"]
    + [".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Words that pycocoevalcap drops. It compares them after lowercasing, so that brackets, which are
"-lrb-" then, stay words."""

# Parts of rules. A letter in a class stands for its case, elsewhere for both: see `_rule`.
# Python counts fractions and raised digits as characters of words, Java does not.
_NO_WORD = (
    "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2089\u2150-\u2189\u2460-\u249b\u24ea-\u24ff"
    "\u2776-\u2793"
)
_LETTER = f"[^\\W\\d_{_NO_WORD}]"
_IN_WORD = f"(?:{_LETTER}|&[aeiouAEIOU](?:acute|grave|uml);|[\u00ad\u0300-\u036f])"
_SPACE = "[ \\t\u00a0\u2000-\u200a\u3000]"
_NEWLINE = "(?:\\r?\\n|\\r|[\u2028\u2029\u000b\u000c\u0085])"
_BLANK = f"(?:{_SPACE}|{_NEWLINE})"
_APOSTROPHE = "(?:['\u0092\u2019]|&apos;)"
_QUOTE_IN_WORD = f"(?:{_APOSTROPHE}|[`\u0091\u2018\u201b])"
_HYPHEN = "[-_\u058a\u2010\u2011]"
_WORD = f"{_IN_WORD}(?:{_IN_WORD}|\\d)*(?:[.!?]{_IN_WORD}(?:{_IN_WORD}|\\d)*)*"
_ENDING = f"{_APOSTROPHE}(?:[msdMSD]|re|ve|ll)"
_NOT = f"n{_QUOTE_IN_WORD}t"
_NUMBER = "[-+]?(?:\\d*(?:[.:,\u00ad\u066b\u066c]\\d+)+|\\d+)"
_INITIALS = (
    "(?:(?:Canada|Sino|Korean|EU|Japan|non)-U\\.S|U\\.S\\.-U\\.(?:K|S\\.S\\.R)"
    "|[A-Za-z](?:\\.[A-Za-z])*)"
)
_TAG = (
    "<(?:[!?][A-Za-z-][^>\\r\\n]*|/[A-Za-z][A-Za-z0-9_:.-]*"
    "|[A-Za-z][A-Za-z0-9_:.-]*(?: +[A-Za-z][A-Za-z0-9_:.-]*(?: *= *(?:'[^']*'|\"[^\"]*\"))?)* */?)"
    " *>"
)
_HYPHENATED = (
    "[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:(?:[A-Za-z](?:\\.[A-Za-z])+)\\.|[A-Za-z0-9\u00ad]+))+"
)
_WORD_PART = f"(?:[dDoOlL]{_QUOTE_IN_WORD}[^\\W_{_NO_WORD}])?[^\\W_{_NO_WORD}]+"
_COMPOUND = f"{_WORD_PART}(?:{_HYPHEN}{_WORD_PART})*"
_CAPITALS = "[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"
# Abbreviations that small letters mostly follow; before a capital the sentence ends as well.
_MID_ABBREVIATION = (
    "(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thu|Thurs|Fri"
    "|Ala|Ariz|[A]z|[A]rk|Calif|Colo|Conn|Ct|Dak|[D]el|Fla|Ga|[I]ll|Ind|Kans?|Ky|[L]a|[M]ass|Md"
    "|Mich|Minn|[M]iss|Mo|Mont|Neb|Nev|Okla|[O]re|[P]a|Penn|Tenn|[T]ex|Va|Vt|[W]ash|Wisc?|Wyo"
    "|Inc|Cos?|Corp|Pp?t[ye]s?|Ltd|Plc|Rt|Bancorp|Bhd|Assn|Univ|Intl|Sys|tel|est|ext|sq"
    "|Jr|Sr|Bros|(?:Ed|Ph)\\.D|Blvd|Rd|Esq|etc|al|seq|Bldg)\\."
)
# Abbreviations that capitals mostly follow.
_TITLE_ABBREVIATION = (
    "(?:Mrs?|Ms|[M]iss|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl"
    "|Pvt|Capt|Ste?|Ave|Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens"
    "|Insp|Mlle|Mme|Msgr|Sfc|vs|Alex|Wm|Jos|Cie|cf|TREAS|Ph|Invt|Elec|Natl|M[ft]g|Dept"
    f"|{_INITIALS})"
)
_BEFORE_NUMBERS = "(?:ca|figs?|prop|nos?|art|bldg|pp|op)\\."
_SENTENCE_STARTS = (
    "(?:[A]bout|[A]ccording|[A]dditionally|[A]fter|[A]n|[A]s|[A]t|[A]|[B]ut|[E]arlier|[H]ere|[H]er"
    "|[H]e|[H]owever|[I]f|[I]n|[I]t|[L]ast|[M]any|[M]ore|[M]r\\.|[M]s\\.|[N]ow|[O]nce|[O]ne|[O]ther"
    "|[O]ur|[S]he|[S]ince|[S]ome|[S]o|[S]uch|[T]hat|[T]heir|[T]hen|[T]here|[T]hese|[T]hey|[T]he"
    f"|[T]his|[W]e|[W]hen|[W]hile|[W]hat|[Y]et|[Y]ou|{_TAG})"
)
_APOSTROPHE_WORD = (
    f"(?:{_APOSTROPHE}n{_APOSTROPHE}?|[lLdDjJ]{_APOSTROPHE}|Dunkin{_APOSTROPHE}"
    f"|somethin{_APOSTROPHE}|ol{_APOSTROPHE}|{_APOSTROPHE}em"
    f"|[A-HJ-XZn]{_QUOTE_IN_WORD}{_LETTER}{{2,}}|{_APOSTROPHE}[2-9]0s|{_APOSTROPHE}till?"
    f"|{_LETTER}+[aeiouyAEIOUY]{_QUOTE_IN_WORD}[aeiouA-Z]{_LETTER}*|{_APOSTROPHE}cause"
    f"|cont'd\\.?|'twas|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|O{_QUOTE_IN_WORD}o)"
)
_NO_URL = '[^ \\t\\n\\f\\r"<>|()'
_LIKELY_ADDRESS = (
    f"(?:www\\.(?:{_NO_URL}.!?{{}},]+\\.)+[a-zA-Z]{{2,4}}"
    "|(?:[^ \\t\\n\\f\\r\"`'<>|.!?(){},-_$]+\\.)+(?:com|net|org|edu))"
    f"(?:/{_NO_URL}]+{_NO_URL}.!?{{}},-])?"
)
_MAIL = (
    f"(?:&lt;|<)?[a-zA-Z0-9]{_NO_URL}\u00a0{{}}]*@(?:{_NO_URL}{{}}.\u00a0]+\\.)*"
    f"{_NO_URL}{{}}.\u00a0]+(?:&gt;|>)?"
)
_PHONE = (
    "(?:(?:\\([0-9]{2,3}\\)[ \u00a0]?|(?:\\+\\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])"
    "[0-9]{3,4}[- \u00a0]?[0-9]{3,5}|(?:(?:\\+\\+?)?[0-9]{2,4}\\.)?[0-9]{2,4}\\.[0-9]{3,4}\\."
    "[0-9]{3,5})"
)
_FILE_NAME = (
    f"(?:{_IN_WORD}|\\d)+(?:\\.(?:{_IN_WORD}|\\d)+)*\\.(?:bat|bmp|class|cgi|cpp|c|dll|docx|doc|exe"
    "|gif|gz|html|htm|h|jar|java|jpeg|jpg|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|wav|xml|x"
    "|zip)"
)
_SPECIAL = (
    f"(?:-(?:RRB|LRB|RCB|LCB|RSB|LSB)-|C\\.D\\.s|pro-|anti-|S(?:&|&amp;)P-500|S(?:&|&amp;)Ls"
    f"|Cap{_APOSTROPHE}n|c{_APOSTROPHE}est)"
)
_QUOTES = (
    f"(?:''|[`\u2018\u2019\u201a\u201b\u201c\u201d\u0091\u0092\u0093\u0094\u201e\u201f\u2039\u203a"
    f"\u00ab\u00bb]{{1,2}}|{_APOSTROPHE})"
)
_SYMBOL = (
    "[+%&~^|\\\\\u00a6-\u00a9\u00ac\u00ae-\u00b4\u00b5-\u00ba\u00d7\u00f7\u0387\u05be\u060c\u2016"
    "\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u207a-\u207f\u208a-\u208e"
    "\u2100-\u214f\u2190-\u2bff\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)
_CURRENCY = "[\u00a2-\u00a5\u0080\u060b\u0e3f\u20a0\u20a4\u20ac\uffe0\uffe1\uffe5\uffe6]"
_FRACTIONS = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_BRACKETS = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}


def _no_soft_hyphens(text: str) -> str:
    return text.replace("\u00ad", "") or "-"


def _joined(text: str) -> str:
    """The spaces within a word are made ones that do not part it."""
    return text.replace(" ", "\u00a0")


def _round_brackets(text: str) -> str:
    return text.replace("(", "-LRB-").replace(")", "-RRB-")


def _plain_ampersand(text: str) -> str:
    return re.sub("&amp;", "&", text, flags=re.IGNORECASE)


def _quotes(text: str, opening: bool) -> str:
    double, single = ("``", "`") if opening else ("''", "'")
    text = re.sub("&apos;|'", single, text)
    text = re.sub('"|&quot;', double, text)
    text = re.sub("[\u0091\u2018\u201b\u2039]", "`", text)
    text = re.sub("[\u0092\u2019\u203a]", "'", text)
    text = re.sub("[\u0093\u201c\u00ab]", "``", text)
    return re.sub("[\u0094\u201d\u00bb]", "''", text)


def _opening(text: str) -> str:
    return _quotes(text, True)


def _closing(text: str) -> str:
    return _quotes(text, False)


def _money(text: str) -> str:
    text = text.replace("\u00a2", "cents").replace("\u00a3", "#")
    return re.sub("[\u0080\u00a4\u20a0\u20ac]", "$", text)


def _dashes(text: str) -> str:
    return "--" if 3 <= len(text) <= 4 else text


@dataclass(frozen=True)
class _Rule:
    pattern: re.Pattern[str]  # its group 1 is the body
    to_word: Callable[[str], str]
    num_returned: int = 0
    """Characters of the body that are read again, although they may stand in the word as well."""
    keeps_returned: bool = False
    """Whether they do."""
    drops: bool = False
    """Whether there is no word."""


def _same(text: str) -> str:
    return text


def _rule(
    body: str,
    followed_by: str = "",
    to_word: Callable[[str], str] = _same,
    num_returned: int = 0,
    keeps_returned: bool = False,
    drops: bool = False,
) -> _Rule:
    pattern = re.compile(f"({_either_case(body)}){_either_case(followed_by)}")
    return _Rule(pattern, to_word, num_returned, keeps_returned, drops)


def _either_case(pattern: str) -> str:
    """Let letters outside of classes stand for both cases."""
    parts = re.split(r"(\[(?:\\.|[^\]\\])*\]|\\.|\(\?[:<!=]+)", pattern)
    return "".join(
        part
        if number % 2
        else re.sub("[a-zA-Z]", lambda m: f"[{m[0].lower()}{m[0].upper()}]", part)
        for number, part in enumerate(parts)
    )


_RULES = (
    _rule("c\\+\\+"),
    _rule("(?:c|f)#"),
    _rule("cannot", num_returned=3),
    _rule("'twas", num_returned=3),
    _rule("'tis", num_returned=2),
    _rule("(?:gonna|gotta|lemme|gimme|wanna)", num_returned=2),
    _rule(_TAG, to_word=_joined),
    _rule("(?:&(?:MD|mdash|ndash);|[\u0096\u0097\u2013\u2014\u2015])", to_word=lambda _: "--"),
    _rule("&amp;", to_word=_plain_ampersand),
    _rule("&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);"),
    _rule(_WORD, _ENDING, _no_soft_hyphens),
    _rule("[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", _NOT, _no_soft_hyphens),
    _rule(_WORD, to_word=_no_soft_hyphens),
    _rule(_APOSTROPHE_WORD),
    _rule(f"y{_APOSTROPHE}", _LETTER),
    _rule(f"https?://{_NO_URL}{{}}]+{_NO_URL}.!?{{}},-]"),
    _rule(_LIKELY_ADDRESS),
    _rule(_MAIL),
    _rule(f"(?:@[a-zA-Z_][a-zA-Z_0-9]*|#{_IN_WORD}+)"),
    _rule(_ENDING, "[^A-Za-z]", _closing),
    _rule(_NOT, "[^A-Za-z]", _closing),
    _rule("\\d{1,2}[-/]\\d{1,2}[-/]\\d{2,4}"),
    _rule(_NUMBER, to_word=_no_soft_hyphens),
    _rule(
        "[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"
    ),
    _rule("(?:\\d{1,4}[- \u00a0])?\\d{1,4}(?:\\\\?/|\u2044)\\d{1,4}", to_word=_joined),
    _rule("[\u00bc-\u00be\u2153-\u215e]", to_word=lambda text: _FRACTIONS.get(text, text)),
    _rule(_SPECIAL, to_word=_plain_ampersand),
    _rule(
        "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
    ),
    _rule("(?:[A-Z]*\\$|#)"),
    _rule(_CURRENCY, to_word=_money),
    # A single letter is one before the end of a sentence, not initials.
    _rule("[A-Za-z]\\.", f"{_BLANK}+{_SENTENCE_STARTS}{_BLANK}", num_returned=1),
    _rule(
        f"{_INITIALS}\\.",
        f"{_BLANK}+{_SENTENCE_STARTS}{_BLANK}",
        num_returned=1,
        keeps_returned=True,
    ),
    _rule(_BEFORE_NUMBERS, f"{_BLANK}?\\d"),
    _rule("(?:pt[eyEY]|co)\\.", f"{_SPACE}(?:ltd|lim)"),
    _rule(
        _MID_ABBREVIATION,
        f"{_BLANK}(?:{_BLANK}|{_TAG}|[A-Z\u00c0-\u00de])",
        num_returned=1,
        keeps_returned=True,
    ),
    _rule(_MID_ABBREVIATION, "[\\s\\S][\\s\\S]"),
    _rule(_MID_ABBREVIATION, num_returned=1, keeps_returned=True),
    _rule(f"{_TITLE_ABBREVIATION}\\."),
    _rule(_TITLE_ABBREVIATION, _SPACE),
    _rule(_INITIALS, _BLANK),
    _rule(f"{_APOSTROPHE}[0-9][0-9]", _BLANK),
    _rule(_FILE_NAME, f"(?:{_BLANK}|[.?!,])"),
    _rule(f"{_WORD}\\.", "[,;:\u3001]", _no_soft_hyphens),
    _rule(_PHONE, to_word=lambda text: _round_brackets(_joined(text))),
    _rule('(?:"|&quot;)', "[A-Za-z0-9$]", _opening),
    _rule('(?:"|&quot;)', to_word=_closing),
    _rule("\x7f", drops=True),
    _rule("(?:<|&lt;)", to_word=lambda _: "<"),
    _rule("(?:>|&gt;)", to_word=lambda _: ">"),
    _rule("[<>]?[:;=][-o*']?[()DPdpO\\\\{@|\\[\\]]", "[^A-Za-z0-9]", _round_brackets),
    _rule(
        "(?:[\\^x=~<>]\\.\\[\\^x=~<>\\]|[-^x=~<>']_[-^x=~<>']|\\([-^x=~<>'][_.]?[-^x=~<>']\\)"
        "|\\([\\^x=~<>']-[\\^x=~<>'`]\\))",
        to_word=_round_brackets,
    ),
    _rule("[][(){}]", to_word=lambda text: _BRACKETS[text]),
    _rule("-+", to_word=_dashes),
    _rule("(?:\\.{3,5}|(?:\\.[ \u00a0]){2,4}\\.|[\u0085\u2026])", to_word=lambda _: "..."),
    _rule("(?:@+|#+|_+)"),
    _rule("(?:\\*+|(?:\\\\\\*){1,3})"),
    _rule("[,;:\u3001]"),
    _rule("[?!]+"),
    _rule("[.\u00a1\u00bf\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002]"),
    _rule("="),
    _rule("/"),
    _rule(f"{_HYPHENATED}\\.", "[,;:\u3001]", _no_soft_hyphens),
    _rule(_HYPHENATED, to_word=_no_soft_hyphens),
    _rule(f"{_COMPOUND}\\.", "[,;:\u3001]"),
    _rule(_COMPOUND),
    _rule(f"{_CAPITALS}\\.", "[,;:\u3001]", _plain_ampersand),
    _rule(_CAPITALS, to_word=_plain_ampersand),
    _rule("'", "[A-Za-z][^ \\t\\n\\r\u00a0]", _opening),
    _rule(_ENDING, to_word=_closing),
    _rule(_NOT, to_word=_closing),
    _rule(_QUOTES, to_word=_closing),
    _rule("(?:<<|>>)"),
    _rule(_SYMBOL),
    _rule(f"(?:\\0|{_SPACE}+|[\u200b\u200e\u200f\ufeff])", drops=True),
    _rule("&nbsp;", drops=True),
)

# Most of a caption: words of small letters before a space, and the last one before the full stop.
# No rule says otherwise of those, contractions and abbreviations aside.
_PLAIN = re.compile(
    "(?!(?:cannot|gonna|gotta|lemme|gimme|wanna)(?![a-z]))([A-Za-z][a-z]+)(?=[ \\n]|,[ \\n]|$)"
)
_LAST = re.compile(
    f"(?!{_either_case(_MID_ABBREVIATION)}|{_either_case(_TITLE_ABBREVIATION)}\\.)"
    f"(?!{_either_case(_BEFORE_NUMBERS)})"
    "(?!(?:cannot|gonna|gotta|lemme|gimme|wanna)(?![a-z]))([A-Za-z][a-z]+)\\.[ ]*(?:$|\\n)"
)
_LINE_BREAKS = re.compile(_NEWLINE)


def tokenize(captions: Sequence[str]) -> list[str]:
    """Split captions into words: lower case, without punctuation, one space between words.

    Captions are read as consecutive lines of a file, as the Java program reads them: whether the
    full stop of "T.V." ends a sentence too may depend on how the next line begins.
    """
    lines = [one_line(caption) for caption in captions]
    words = []
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        ahead = "" if following is None else "\n" + following[:24]
        words.append(without_punctuation([word.lower() for word in _split(line, ahead)]))
    return words


def caption_words(caption: str) -> list[str]:
    """The words of one caption, whatever stands beside it."""
    return tokenize([caption])[0].split()


def one_line(caption: str) -> str:
    """The caption with a space for each line break."""
    return _LINE_BREAKS.sub(" ", caption)


def without_punctuation(words: Iterable[str]) -> str:
    """Words with a space between, those of `PUNCTUATION` left out."""
    return " ".join(word for word in words if word not in PUNCTUATION)


def _split(line: str, ahead: str) -> Iterator[str]:
    """Words and punctuation marks of a line; `ahead` is what stands behind it, to look at."""
    text = line + ahead
    position, end = 0, len(line)
    while position < end:
        # Marks before a space are words of their own, and dropped.
        if text[position] == " " or (
            text[position] in ".," and (position + 1 == end or text[position + 1] == " ")
        ):
            position += 1
            continue
        plain = _PLAIN.match(text, position)
        if plain is not None:
            yield plain[1]
            position = plain.end()
            continue
        last = _LAST.match(text, position)
        if last is not None and last.end() >= end:
            yield last[1]
            return
        best: re.Match[str] | None = None
        rule = _RULES[0]
        for candidate in _RULES:
            found = candidate.pattern.match(text, position)
            if found is not None and (best is None or found.end() > best.end()):
                best, rule = found, candidate
        if best is None:  # a character that no rule knows is left out
            position += 1
            continue
        body_end = min(best.end(1), end)
        body = text[position:body_end]
        cut = len(body) - rule.num_returned
        if not rule.drops:
            yield rule.to_word(body if rule.keeps_returned else body[:cut])
        position += max(1, cut)
