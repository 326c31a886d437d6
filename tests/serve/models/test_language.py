"""A paragraph's language is named; a word or two, numbers and names are none."""

from __future__ import annotations

import pytest

from serve.models.language import CODE, NAMES, UNKNOWN, language_of, words

TEXTS = {
    "en": "The committee has not decided yet which of the two plans it will support, and there is little time left.",
    "de": "Der Ausschuss hat noch nicht entschieden, welchen der beiden Pläne er unterstützt, und die Zeit ist knapp.",
    "fr": "Le comité n'a pas encore décidé lequel des deux plans il va soutenir, et il ne reste que peu de temps.",
    "es": "El comité aún no ha decidido cuál de los dos planes va a apoyar, y no queda mucho tiempo para hacerlo.",
    "it": "Il comitato non ha ancora deciso quale dei due piani sosterrà, e non è rimasto molto tempo per farlo.",
    "pt": "O comité ainda não decidiu qual dos dois planos vai apoiar, e já não há muito tempo para isso.",
    "nl": "De commissie heeft nog niet besloten welke van de twee plannen zij zal steunen, en er is weinig tijd over.",
    "sv": "Kommittén har ännu inte bestämt vilken av de två planerna som den ska stödja, och det är ont om tid.",
    "pl": "Komisja nie zdecydowała jeszcze, który z dwóch planów poprze, i nie ma już na to wiele czasu.",
    "cs": "Výbor ještě nerozhodl, který ze dvou plánů podpoří, a na to už není mnoho času, protože se to musí stát.",
    "ro": "Comitetul nu a decis încă pe care dintre cele două planuri îl va susține și nu mai este mult timp.",
    "hu": "A bizottság még nem döntött arról, hogy a két terv közül melyiket támogatja, és már nem sok idő van.",
    "fi": "Komitea ei ole vielä päättänyt, kumpaa suunnitelmaa se tukee, ja aikaa on enää vain vähän jos sitä on.",
    "tr": "Komite bu iki plandan hangisini destekleyeceği için henüz bir karar vermedi ve çok az zaman var.",
    "id": "Panitia itu belum memutuskan rencana mana yang akan mereka dukung, dan waktu yang ada tidak lama.",
    "vi": "Ủy ban vẫn chưa quyết định sẽ ủng hộ kế hoạch nào trong hai kế hoạch và không còn nhiều thời gian.",
    "ru": "Комитет ещё не решил, какой из двух планов он поддержит, и времени осталось мало.",
    "uk": "Комітет ще не вирішив, який із двох планів він підтримає, і часу залишилося мало.",
    "el": "Η επιτροπή δεν έχει αποφασίσει ακόμη ποιο από τα δύο σχέδια θα υποστηρίξει.",
    "he": "הוועדה עדיין לא החליטה באיזו מהתוכניות תתמוך",
    "ar": "لم تقرر اللجنة بعد أي الخطتين ستدعم ولم يبق وقت طويل",
    "hi": "समिति ने अभी तक यह तय नहीं किया है कि वह किस योजना का समर्थन करेगी",
    "th": "คณะกรรมการยังไม่ได้ตัดสินใจว่าจะสนับสนุนแผนใด",
    "ja": "委員会はどちらの計画を支持するかまだ決めていません。",
    "zh": "委员会尚未决定支持哪一个计划,时间已经不多了。",
    "ko": "위원회는 두 계획 중 어느 것을 지지할지 아직 결정하지 않았다.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_a_sentence_is_in_its_language(language):
    assert language_of(TEXTS[language]) == language and language in NAMES


@pytest.mark.parametrize(
    "text", ["is a lieutenant colonel higher than a captain", "is a boston terrier a small breed dog", "is it a loan"]
)
def test_a_short_question_in_english_is_in_no_other_language(text):
    assert language_of(text) in ("en", UNKNOWN)


@pytest.mark.parametrize("text", ["", "42", "Invoice 2024-17", "Müller GmbH Hamburg", "ok", "!!! ???", "😀 😀"])
def test_what_says_nothing_of_its_language_is_in_none(text):
    assert language_of(text) == UNKNOWN


def test_program_code_is_no_language():
    code = "def add(a, b):\n    return {'sum': a + b}\n\nfor (int i = 0; i < n; i++) { x[i] = add(x[i], 1); }\n"
    assert language_of(code) == CODE


def test_words_of_scripts_without_spaces_are_pairs():
    assert words("Hello, it's 3 Äpfel") == ["hello", "it's", "äpfel"]
    assert words("東京都 foo") == ["東京", "京都", "foo"]


def test_a_very_long_text_is_in_its_language_too():
    assert language_of("that " * 70_000) == language_of("that " * 10)
