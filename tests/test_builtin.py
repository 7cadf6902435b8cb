import random
import re
from collections import Counter

import pytest

from repe_unlearn.builtin import gender as gender_package
from repe_unlearn.builtin import generator
from repe_unlearn.builtin.blocks import BLOCKS
from repe_unlearn.builtin.gender import COMPANY, KIN, PERSONS, PRONOUNS
from repe_unlearn.builtin.gender import FRAMES as GENDER_FRAMES
from repe_unlearn.builtin.tense import FRAMES as TENSE_FRAMES
from repe_unlearn.contrast import Contrast
from repe_unlearn.errors import InputError, NotEnoughDataError

NAMES = ("gender", "tense")
FUNCTION_WORDS = {
    "the",
    "at",
    "in",
    "near",
    "behind",
    "outside",
    "beside",
    "by",
    "under",
    "before",
    "after",
    "during",
}
AUXILIARIES = {("was", "is"), ("had", "has"), ("did", "does")}
MAIN_VERBS = {(verb.past, verb.present) for block in BLOCKS for verb in block.verbs}


@pytest.fixture(scope="module", params=NAMES)
def big(request):
    return Contrast.builtin(request.param, pairs=6500, seed=3)


@pytest.fixture(scope="module")
def by_name():
    return {name: Contrast.builtin(name, pairs=1500, seed=1) for name in NAMES}


def allowed_swaps(name):
    if name == "gender":
        swaps = {*PRONOUNS.values(), *KIN, ("Ms.", "Mr."), ("woman", "man")}
        swaps |= {("herself", "himself"), ("her", "him")}
        swaps |= {pair for block in BLOCKS for pair in zip(block.female, block.male, strict=True)}
    else:
        swaps = AUXILIARIES | MAIN_VERBS
    return {(a.lower(), b.lower()) for a, b in swaps}


def swaps_of(first, second):
    strip = str.maketrans("", "", ",")
    return [
        (a.translate(strip).lower(), b.translate(strip).lower())
        for a, b in zip(first.split(), second.split(), strict=True)
        if a != b
    ]


def two_sides(contrast):
    return list(zip(contrast.examples[::2], contrast.examples[1::2], strict=True))


def is_clean(text):
    plural_article = re.search(r"\b[Aa]n? [a-z]+ [a-z]*ss\b", text)
    article = re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n (?!hour)[^aeiouAEIOU]", text)
    stops = text.replace("Ms.", "Ms").replace("Mr.", "Mr").count(".")
    return (
        text[0].isupper()
        and text.endswith(".")
        and stops == 1
        and "  " not in text
        and text == text.strip()
        and " ." not in text
        and " ," not in text
        and "{" not in text
        and not article
        and not plural_article
        and not re.search(r"\b(\w+) \1\b", text)
    )


def test_sentences_are_well_formed(big):
    assert [text for text in big.texts if not is_clean(text)] == []


@pytest.mark.parametrize(
    "bad",
    ["the cook.", "A engineer left.", "An cook left.", "He  left.", "He left", "He left .", "He had had it."],
)
def test_the_wellformedness_check_finds_faults(bad):
    assert not is_clean(bad)


def test_every_pair_differs_only_in_the_words_of_the_concept(big):
    allowed = allowed_swaps(big.name)
    for first, second in two_sides(big):
        swaps = swaps_of(first.text, second.text)
        assert swaps, first.text
        assert set(swaps) <= allowed, (first.text, second.text)
        assert (first.label, second.label) == (0, 1)
        assert (first.pair, first.group, first.template) == (second.pair, second.group, second.template)


def test_the_pair_check_finds_a_foreign_difference():
    assert not set(swaps_of("The cook said she left.", "The nurse said he left.")) <= allowed_swaps("gender")


def test_neutral_words_follow_the_concept(big):
    for first, second in two_sides(big):
        a, b = first.text.split(), second.text.split()
        last = max(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        assert a[last + 1 :] == b[last + 1 :]
        assert len(a) - 1 - last >= 4, first.text


def test_focus_is_the_first_word_of_the_concept(big):
    allowed = allowed_swaps(big.name)
    for first, second in two_sides(big):
        words = [example.text[slice(*example.focus)].lower() for example in (first, second)]
        assert tuple(words) in allowed
        assert first.focus[0] == second.focus[0]
        same, other = first.text[: first.focus[0]], second.text[: second.focus[0]]
        assert same == other


def test_lengths(big):
    lengths = [len(text.split()) for text in big.texts]
    assert sum(lengths) / len(lengths) <= 20
    assert min(lengths) >= 10
    assert max(lengths) <= 27
    assert len(set(lengths)) >= 8


def test_six_thousand_distinct_pairs(big):
    assert len(set(big.texts)) == len(big) == 13000
    assert len({example.pair for example in big}) == 6500
    assert len({frozenset((a.text, b.text)) for a, b in two_sides(big)}) == 6500


def test_balance_over_classes_blocks_and_frames(big):
    assert set(Counter(big.labels).values()) == {6500}
    for keys in (big.groups, big.templates):
        counts = Counter(keys).values()
        assert max(counts) <= 1.2 * min(counts)
    assert len(set(big.groups)) == 16
    assert len(set(big.templates)) == {"gender": len(GENDER_FRAMES), "tense": len(TENSE_FRAMES)}[big.name]


@pytest.mark.parametrize("name", NAMES)
def test_a_small_draw_uses_all_blocks_and_frames(name):
    small = Contrast.builtin(name, pairs=64)
    assert set(Counter(small.groups).values()) == {8}
    assert max(Counter(small.templates).values()) <= 4


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_prompts_and_others_do_not(name):
    once, again, other = (Contrast.builtin(name, pairs=200, seed=seed) for seed in (5, 5, 6))
    assert once.examples == again.examples
    assert len(set(once.texts) & set(other.texts)) < 40
    assert Contrast.builtin(name, pairs=50, seed=5).examples == once.examples[:100]


@pytest.mark.parametrize("seed", range(5))
def test_split_shares_no_content_and_no_wording(by_name, seed):
    for contrast in by_name.values():
        fit, heldout = contrast.split(test=0.25, seed=seed)
        for keys in ("groups", "templates", "pairs", "texts"):
            assert not set(getattr(fit, keys)) & set(getattr(heldout, keys))
        assert set(fit.labels) == set(heldout.labels) == {0, 1}
        assert Counter(fit.labels)[0] == Counter(fit.labels)[1]
        assert Counter(heldout.labels)[0] == Counter(heldout.labels)[1]
        assert len(heldout) / (len(fit) + len(heldout)) == pytest.approx(0.25, abs=0.04)
        assert fit.dropped == heldout.dropped == len(contrast) - len(fit) - len(heldout) > 0


def test_blocks_share_no_content_word():
    owners = {}
    for number, block in enumerate(BLOCKS):
        phrases = [
            *block.occupations,
            *block.female,
            *block.male,
            *block.surnames,
            *block.places,
            *block.times,
        ]
        for verb in block.verbs:
            phrases += [verb.base, verb.present, verb.past, verb.participle, verb.gerund, *verb.objects]
        for word in {word.lower() for phrase in phrases for word in phrase.split()} - FUNCTION_WORDS:
            owners.setdefault(word, set()).add(number)
    assert {word: found for word, found in owners.items() if len(found) > 1} == {}


def test_held_out_sentences_share_few_words_with_the_others():
    contrast = Contrast.builtin("gender", pairs=2000)
    fit, heldout = contrast.split(seed=0)
    names = {name.lower() for block in BLOCKS for name in (*block.occupations, *block.female, *block.male)}

    def words(part):
        return {word.strip(".,").lower() for text in part for word in text.split()} & names

    assert words(fit.texts)
    assert words(heldout.texts)
    assert not words(fit.texts) & words(heldout.texts)
    assert words(contrast.texts[::2]) & words(contrast.texts[1::2])


def test_table_sizes():
    assert len(BLOCKS) == 16
    for block in BLOCKS:
        assert len(set(block.occupations)) == len(set(block.verbs)) == 10
        assert len(set(block.female)) == len(set(block.male)) == 10
        assert not set(block.female) & set(block.male)
        assert all(len(place.split()) >= 3 for place in block.places)
    assert len({verb.base for block in BLOCKS for verb in block.verbs}) == 160
    everyone = [name for block in BLOCKS for name in (*block.female, *block.male)]
    assert len(set(everyone)) == len(everyone) == 320


def test_no_verb_looks_the_same_in_past_and_present():
    for block in BLOCKS:
        for verb in block.verbs:
            assert verb.past not in (verb.base, verb.present, verb.gerund)
            assert verb.present.endswith("s")
            assert verb.gerund.endswith("ing")
            assert len(verb.objects) == 2


def test_regular_verbs_are_inflected_by_rule():
    forms = {verb.base: (verb.present, verb.past, verb.gerund) for block in BLOCKS for verb in block.verbs}
    assert forms["carry"] == ("carries", "carried", "carrying")
    assert forms["wash"] == ("washes", "washed", "washing")
    assert forms["fix"] == ("fixes", "fixed", "fixing")
    assert forms["play"] == ("plays", "played", "playing")
    assert forms["glue"] == ("glues", "glued", "gluing")
    assert forms["write"] == ("writes", "wrote", "writing")
    assert forms["scrub"] == ("scrubs", "scrubbed", "scrubbing")


def test_tense_hides_in_no_other_word():
    for frame in TENSE_FRAMES:
        assert not re.search(
            r"\b(now|today|yesterday|ago|last|soon|tomorrow|currently|once|used)\b", frame
        ), frame


def slots(frame):
    return Counter(re.findall(r"\{(\w+)\}", frame))


@pytest.mark.parametrize(
    ("frames", "concept"),
    [
        (GENDER_FRAMES, {"person": 1, "he": 1, "his": 1, "company": 1}),
        (TENSE_FRAMES, {"acts": 1, "also": 1, "state": 1, "person": 1}),
    ],
)
def test_every_frame_has_the_same_slots_for_the_concept(frames, concept):
    assert len(set(frames)) == len(frames) >= 40
    for frame in frames:
        found = slots(frame)
        assert {slot: found[slot] for slot in concept} == concept, frame
        assert set(found) - set(concept) <= {"do", "did", "doing", "place", "time", "other"}, frame
        assert max(found.values()) == 1, frame


def forms_of(name, first, second):
    """What kinds of words carry the concept in one pair, in any order."""
    found = Counter(swaps_of(first.text, second.text))
    if name == "tense":
        return tuple(
            sorted(Counter(swap[1] if swap in AUXILIARIES else "verb" for swap in found.elements()).items())
        )
    names = {
        (a.lower(), b.lower()) for block in BLOCKS for a, b in zip(block.female, block.male, strict=True)
    }
    kinds = {("ms.", "mr."): "title", ("woman", "man"): "young"} | dict.fromkeys(KIN, "kin")
    kinds |= {
        ("herself", "himself"): "himself",
        ("her", "him"): "him",
        ("she", "he"): "he",
        ("her", "his"): "his",
    }
    return tuple(sorted(Counter("name" if s in names else kinds[s] for s in found.elements()).items()))


def forms_by_frame(contrast):
    found = {frame: Counter() for frame in contrast.templates}
    for first, second in two_sides(contrast):
        found[first.template][forms_of(contrast.name, first, second)] += 1
    return found


@pytest.mark.parametrize(("name", "frames"), [("gender", GENDER_FRAMES), ("tense", TENSE_FRAMES)])
def test_all_frames_have_the_same_mixture_of_forms(name, frames):
    # Five rounds of all blocks make 80 pairs per frame: twice the 40 cells of gender, 16 times the 5 states of tense.
    found = forms_by_frame(Contrast.builtin(name, pairs=5 * 16 * len(frames), seed=2))
    if name == "gender":
        company = Counter({"none": 2, "himself": 1, "him": 1})
        expected = Counter()
        for person in PERSONS:
            for where, weight in company.items():
                shown = {"he": 1, "his": 1}
                shown |= {} if person == "occupation" else {person: 1}
                shown |= {} if where == "none" else {where: 1}
                expected[tuple(sorted(shown.items()))] += 2 * weight
    else:
        expected = Counter(
            {
                tuple(sorted({"verb": 2, aux: 1}.items())): n
                for aux, n in (("is", 32), ("has", 32), ("does", 16))
            }
        )
    assert all(counts == expected for counts in found.values())


def spread(contrast, kind):
    """Largest difference between two frames in the share of pairs that show this kind of word."""
    shares = []
    for counts in forms_by_frame(contrast).values():
        shown = sum(n for forms, n in counts.items() if kind in dict(forms))
        shares.append(shown / counts.total())
    return max(shares) - min(shares)


@pytest.mark.parametrize(
    ("name", "kinds"), [("gender", ("name", "himself", "him")), ("tense", ("is", "has"))]
)
def test_a_small_draw_has_the_same_mixture_too(name, kinds):
    frames = {"gender": GENDER_FRAMES, "tense": TENSE_FRAMES}[name]
    small = Contrast.builtin(name, pairs=20 * len(frames))
    assert all(spread(small, kind) <= 0.1 for kind in kinds)


def test_the_mixture_check_finds_independent_draws():
    def fill(block, levels, rng):
        return {
            "he": PRONOUNS["he"],
            "his": PRONOUNS["his"],
            "company": COMPANY[rng.choice(list(COMPANY))],
        } | {
            slot: rng.choice(block.occupations) for slot in ("person", "do", "did", "doing", "place", "time")
        }

    drawn = generator.generate(
        "gender", ("female", "male"), GENDER_FRAMES, {}, fill, pairs=20 * len(GENDER_FRAMES), seed=0
    )
    assert spread(drawn, "himself") > 0.3


def test_factors_are_crossed_and_every_stretch_is_balanced():
    turns = generator._turns({"a": tuple("aaabcd"), "b": tuple("wxyz")}, random.Random(0))
    drawn = [tuple(next(turns).values()) for _ in range(48)]
    assert Counter(drawn) == {(a, b): 6 if a == "a" else 2 for a in "abcd" for b in "wxyz"}
    for start in range(42):
        assert Counter(a for a, _ in drawn[start : start + 6])["a"] == 3


def test_focus_is_one_word_of_a_phrase():
    filling = {"company": ("by herself", "by himself")}
    for (text, focus), word in zip(
        generator.render("They sat {company} there.", filling), ("herself", "himself"), strict=True
    ):
        assert text[slice(*focus)] == word
    with pytest.raises(InputError, match="both classes say 'alone'"):
        generator.render("They sat {company}.", {"company": ("alone", "alone")})


def test_errors():
    with pytest.raises(InputError, match=r"no built-in contrast 'mood'; there are gender, tense"):
        Contrast.builtin("mood")
    for pairs in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="positive whole number"):
            Contrast.builtin("gender", pairs=pairs)
    with pytest.raises(InputError, match="no slot of the frame"):
        generator.render("The {occupation} slept.", {"occupation": "cook"})


def test_more_pairs_than_there_are():
    def fill(block, levels, rng):
        return {"he": ("she", "he"), "job": rng.choice(block.occupations)}

    for name in NAMES:
        with pytest.raises(NotEnoughDataError, match=f"{name!r} makes 40000 at most"):
            Contrast.builtin(name, pairs=40_001)
    frames = ("The {job} said {he} was late.",)
    with pytest.raises(NotEnoughDataError, match="'few' can make only 160 distinct ones"):
        generator.generate("few", ("female", "male"), frames, {}, fill, pairs=161, seed=0)
    assert len(generator.generate("few", ("female", "male"), frames, {}, fill, pairs=100, seed=0)) == 200


def test_the_function_is_what_the_classmethod_calls():
    assert gender_package(pairs=20, seed=4).examples == Contrast.builtin("gender", pairs=20, seed=4).examples
