"""Which language a text is probably in: by its script, or for Latin letters by its common words.

    language_of("wo ist der Bahnhof und wann fährt der Zug") == "de"

Good enough to say what a group of requests is in, not what one short request is; "" where it cannot tell. Program code
is `code`. There is no model.
"""

from __future__ import annotations

import re
import sys
from collections import Counter

UNKNOWN, CODE = "", "code"

NAMES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch",
    "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish",
    "ta": "Tamil", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
    CODE: "program code",
}  # fmt: skip

_COMMON = {
    "en": "a also only then than them been being did during between before after first many most such these those "
    "through under where while within without into over just because both any same other another every much "
    "more following used use using make made give tell know need want like one two new time way may might would "
    "us our its here except seen very even still the of and to in is that it was for on are with as his they at "
    "be this have from or had by but what some we can out other were all there when your how said an each she "
    "which do their will about if my you has would me please does not could should who why where i'm don't it's",
    "de": "sein seine seiner ihre ihren immer mehr kein keine alle alles dann doch man muss will hier jetzt ganz viel "
    "etwas nichts damit weil also diese dieser dieses jede jeder ohne unter zwischen gegen wieder schon denn so "
    "um am haben hatte wäre würde gibt machen macht der die das und ist nicht ein eine einen einem einer zu den "
    "dem des mit sich auf für von im wie ich sie er es wir ihr auch als an nach bei aus wenn nur noch werden "
    "wird hat haben sind war kann können mein meine was warum bitte oder aber über durch zum zur dass wo wer "
    "welche soll mir mich",
    "fr": "le la les des et est une un du en que qui dans pour pas sur plus par avec ce cette il elle nous vous je ne "
    "se sont au aux mais ou son sa ses leur été être avoir comme fait tout quel quelle comment pourquoi puis "
    "c'est d'un d'une qu'il peut où mon ma mes",
    "es": "el la los las de y que en un una es por con para no se su lo como más pero sus le ya este esta entre "
    "cuando muy sin sobre también me hasta hay donde quien desde todo nos todos uno ni ser son qué cómo cuál "
    "puede tengo está fue del al porque puedo mi",
    "it": "il lo la gli le di e che è un una in per con non si da del della dei delle nel nella sono come più ma "
    "anche al alla ha questo questa cosa perché quale quali posso mi ti ci essere stato io tu lui lei noi "
    "quando dove chi sul sulla agli ho hanno può",
    "pt": "o a os as de e que do da em um uma é para com não se na no por mais dos das como mas foi ao ele ela seu "
    "sua ou ser quando muito nos já eu também só pelo pela até isso entre era depois sem mesmo aos meu minha "
    "você qual são está tem pode porque",
    "nl": "de het een en van ik te dat die in is je niet zijn op aan met als voor had er maar om hem dan zou of wat "
    "mijn men dit zo door over ze zich bij ook tot mij uit der daar haar naar heb hoe heeft hebben deze u want "
    "nog waarom kan kunnen wel welke wordt",
    "sv": "och det att i en jag hon som han på den med var sig för så till är men ett om hade de av icke mig du henne "
    "då sin nu har inte hans honom skulle hennes där min man ej vid kunde något från ut när efter upp vi dem "
    "vara vad över än kan hur varför vilken",
    "da": "og i jeg det at en den til er som på de med han af for ikke der var mig sig men et har om vi min havde ham "
    "hun nu over da fra du ud sin dem os op man hans hvor eller hvad skal selv her alle vil blev kunne ind når "
    "være hvordan hvorfor kan",
    "no": "og i jeg det at en et den til er som på de med han av ikke der så var meg seg men har om vi min hadde nå "
    "over da ved fra du ut sin dem oss opp man hans hvor eller hva skal selv her alle vil ble kunne inn når "
    "være kom hvordan hvorfor kan etter",
    "pl": "i w na z się nie do to że jest o jak za od po przez co dla czy ale już tylko jego jej są może być był "
    "która który które ich ten tego tej mnie mi ja ty jaki jakie dlaczego gdzie kiedy oraz bardzo można",
    "cs": "a se v je na že to s z do o i ve jsem si ale jako za by jak jeho pro tak po co už nebo být který která "
    "které byl bylo jsou není když jen můj mi kde proč jaký jaké mohu může také při",
    "ro": "și de la în a cu nu că o pe un este ce să din mai se pentru sunt care ca dar sau am ai al ale lui ei prin "
    "după când unde cum despre fi fost dacă era mi îmi foarte poate pot",
    "hu": "a az és hogy nem is egy van ez de meg csak már ha mint el még volt vagy mi ki én ő fel le be minden kell "
    "lehet hogyan miért mit hol mikor nagyon azt ezt nekem",
    "fi": "ja on ei että se hän oli mutta kuin niin joka mitä ovat tai kun en minä sinä me te he ole myös vain jos "
    "nyt sitä tämä siitä mikä miten miksi missä voi olla minun sen jo",
    "tr": "ve bir bu da de için ile ne çok gibi daha var o mı mi ben sen biz siz ama en kadar olarak olan nasıl neden "
    "değil her sonra ise ya veya şu bana beni nedir hangi mu",
    "id": "yang dan di ke dari untuk dengan ini itu tidak adalah pada saya anda kami kita dia mereka akan atau juga "
    "apa bagaimana mengapa bisa dapat ada oleh karena sudah belum jika dalam sebagai lebih seperti",
    "vi": "và của là có không được trong một những cho các người với khi này đã tôi bạn để làm như thế nào ở về ra "
    "vào cũng nhưng thì sẽ tại sao gì",
}  # fmt: skip

# By word: the numbers of the languages that it is common in.
_LANGUAGES: dict[str, tuple[int, ...]] = {}
for _number, _text in enumerate(_COMMON.values()):
    for _word in set(_text.split()):
        _LANGUAGES[_word] = (*_LANGUAGES.get(_word, ()), _number)
# And what it says for each, less where there are many: in units of 1 / _ONE, all languages in the 32-bit places of one
# number, so that a text's words are one sum. Of more words than _MOST_WORDS a place would overflow.
_ONE, _MOST_WORDS = 1 << 16, (1 << 16) - 1
_WORDS = {
    word: sum(round(len(numbers) ** -0.5 * _ONE) << 32 * number for number in numbers)
    for word, numbers in _LANGUAGES.items()
}
_BY_NUMBER = tuple(_COMMON)
# Every common word of every language here: none of them says what a text is about.
STOP_WORDS = frozenset(_WORDS)

# First and last letters of scripts that one language, or one family, is written in.
_SCRIPTS = (
    ("ja", 0x3040, 0x30FF), ("ko", 0xAC00, 0xD7AF), ("zh", 0x4E00, 0x9FFF), ("ru", 0x0400, 0x04FF),
    ("ar", 0x0600, 0x06FF), ("el", 0x0370, 0x03FF), ("he", 0x0590, 0x05FF), ("hi", 0x0900, 0x097F),
    ("bn", 0x0980, 0x09FF), ("ta", 0x0B80, 0x0BFF), ("th", 0x0E00, 0x0E7F),
)  # fmt: skip
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
# The same for a text in ASCII without apostrophes: letters in lower case, and all else is a space.
_SPACED = bytes(ord(chr(code).lower()) if code < 128 and chr(code).isalpha() else 32 for code in range(256))
_BEYOND_LATIN = re.compile(r"[\u0370-\u1cff\u3040-\ud7af]")
_SYMBOLS = b"{}();=<>[]_\\|&"
# Of a text's characters; of its words; and how far ahead of the next language the best must be.
CODE_SHARE = 0.07
COMMON_SHARE = 0.12
AHEAD = 1.15
_CHARACTERS = 2000


def words(text: str) -> list[str]:
    """The words of a text in lower case; what is written without spaces comes as pairs of characters."""
    return _pairs(_found(text))


def language_of(text: str) -> str:
    """Its ISO 639-1 code, `code` for program code, or "" where that cannot be told."""
    return read(text)[0]


def read(text: str) -> tuple[str, list[str]]:
    """Both in one: the language of a text, and its words."""
    words = _found(text)
    if not text.isascii():
        if script := _by_script(text[-_CHARACTERS:]):
            return script, _pairs(words)
        words = [word.replace("’", "'") for word in words]
    written = text.encode("utf-8", "surrogatepass")
    if len(text) >= 20 and len(written) - len(written.translate(None, _SYMBOLS)) > CODE_SHARE * len(text):
        return CODE, words
    total = sum(filter(None, map(_WORDS.get, words[:_MOST_WORDS])))
    scores = memoryview(total.to_bytes(4 * len(_BY_NUMBER), sys.byteorder)).cast("I").tolist()
    if sys.byteorder == "big":
        scores.reverse()
    second, best = sorted(scores)[-2:]
    if best < _ONE * max(1.0, COMMON_SHARE * len(words)) or best < AHEAD * second:
        return UNKNOWN, words
    return _BY_NUMBER[scores.index(best)], words


def _found(text: str) -> list[str]:
    """What stands between spaces, digits and signs, in lower case."""
    if text.isascii() and "'" not in text:
        return text.encode().translate(_SPACED).decode().split()
    return _WORD.findall(text.lower())


def _pairs(found: list[str]) -> list[str]:
    every: list[str] = []
    for word in found:
        if "\u3040" <= word[0] <= "\u9fff":
            every += [word[i : i + 2] for i in range(len(word) - 1)] or [word]
        else:
            every.append(word)
    return every


def _by_script(text: str) -> str:
    """The language of a script that is not Latin, if most letters are in it."""
    foreign = _BEYOND_LATIN.findall(text)
    if len(foreign) < 2 or len(foreign) < 0.2 * len(text):
        return UNKNOWN
    counts: Counter[str] = Counter()
    for letter in foreign:
        code = ord(letter)
        for language, first, last in _SCRIPTS:
            if first <= code <= last:
                counts[language] += 1
                break
    # Japanese is written with Chinese characters too.
    if counts["ja"] > 0.05 * len(foreign):
        return "ja"
    best = counts.most_common(1)
    if not best:
        return UNKNOWN
    (language, _), *_ = best
    if language == "ru" and re.search("[іїєґІЇЄҐ]", text):
        return "uk"
    if language == "ar" and re.search("[پچژگ]", text):
        return "fa"
    return language
