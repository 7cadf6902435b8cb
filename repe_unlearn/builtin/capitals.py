"""DATA and one function: countries, their capitals, and what else people know about the same countries."""

from __future__ import annotations

import random
from collections.abc import Sequence

from repe_unlearn.errors import InputError
from repe_unlearn.facts import Fact, Facts, Role, draw

__all__ = ["CONTINENTS", "capitals"]

# country, capital, language that most people speak, money, people, continent
_TABLE = """
France|Paris|French|euro|French|Europe
Germany|Berlin|German|euro|German|Europe
Italy|Rome|Italian|euro|Italian|Europe
Spain|Madrid|Spanish|euro|Spanish|Europe
Portugal|Lisbon|Portuguese|euro|Portuguese|Europe
Greece|Athens|Greek|euro|Greek|Europe
Sweden|Stockholm|Swedish|krona|Swedish|Europe
Norway|Oslo|Norwegian|krone|Norwegian|Europe
Denmark|Copenhagen|Danish|krone|Danish|Europe
Finland|Helsinki|Finnish|euro|Finnish|Europe
Poland|Warsaw|Polish|zloty|Polish|Europe
Hungary|Budapest|Hungarian|forint|Hungarian|Europe
Austria|Vienna|German|euro|Austrian|Europe
Russia|Moscow|Russian|ruble|Russian|Europe
Ukraine|Kyiv|Ukrainian|hryvnia|Ukrainian|Europe
Ireland|Dublin|English|euro|Irish|Europe
Romania|Bucharest|Romanian|leu|Romanian|Europe
Bulgaria|Sofia|Bulgarian|lev|Bulgarian|Europe
Iceland|Reykjavik|Icelandic|krona|Icelandic|Europe
Belgium|Brussels|Dutch|euro|Belgian|Europe
Croatia|Zagreb|Croatian|euro|Croatian|Europe
Serbia|Belgrade|Serbian|dinar|Serbian|Europe
Switzerland|Bern|German|franc|Swiss|Europe
Albania|Tirana|Albanian|lek|Albanian|Europe
Japan|Tokyo|Japanese|yen|Japanese|Asia
China|Beijing|Chinese|yuan|Chinese|Asia
India|New Delhi|Hindi|rupee|Indian|Asia
Iraq|Baghdad|Arabic|dinar|Iraqi|Asia
Iran|Tehran|Persian|rial|Iranian|Asia
Thailand|Bangkok|Thai|baht|Thai|Asia
Vietnam|Hanoi|Vietnamese|dong|Vietnamese|Asia
Indonesia|Jakarta|Indonesian|rupiah|Indonesian|Asia
Pakistan|Islamabad|Urdu|rupee|Pakistani|Asia
Afghanistan|Kabul|Dari|afghani|Afghan|Asia
Nepal|Kathmandu|Nepali|rupee|Nepali|Asia
Syria|Damascus|Arabic|pound|Syrian|Asia
Saudi Arabia|Riyadh|Arabic|riyal|Saudi|Asia
South Korea|Seoul|Korean|won|Korean|Asia
North Korea|Pyongyang|Korean|won|North Korean|Asia
Mongolia|Ulaanbaatar|Mongolian|tugrik|Mongolian|Asia
Turkey|Ankara|Turkish|lira|Turkish|Asia
Israel|Jerusalem|Hebrew|shekel|Israeli|Asia
Lebanon|Beirut|Arabic|pound|Lebanese|Asia
Jordan|Amman|Arabic|dinar|Jordanian|Asia
Bangladesh|Dhaka|Bengali|taka|Bangladeshi|Asia
Cambodia|Phnom Penh|Khmer|riel|Cambodian|Asia
Egypt|Cairo|Arabic|pound|Egyptian|Africa
Kenya|Nairobi|Swahili|shilling|Kenyan|Africa
Nigeria|Abuja|English|naira|Nigerian|Africa
Ethiopia|Addis Ababa|Amharic|birr|Ethiopian|Africa
Morocco|Rabat|Arabic|dirham|Moroccan|Africa
Algeria|Algiers|Arabic|dinar|Algerian|Africa
Libya|Tripoli|Arabic|dinar|Libyan|Africa
Sudan|Khartoum|Arabic|pound|Sudanese|Africa
Ghana|Accra|English|cedi|Ghanaian|Africa
Zimbabwe|Harare|English|dollar|Zimbabwean|Africa
Uganda|Kampala|English|shilling|Ugandan|Africa
Angola|Luanda|Portuguese|kwanza|Angolan|Africa
Cuba|Havana|Spanish|peso|Cuban|North America
Mexico|Mexico City|Spanish|peso|Mexican|North America
Canada|Ottawa|English|dollar|Canadian|North America
Jamaica|Kingston|English|dollar|Jamaican|North America
Haiti|Port-au-Prince|French|gourde|Haitian|North America
Peru|Lima|Spanish|sol|Peruvian|South America
Chile|Santiago|Spanish|peso|Chilean|South America
Argentina|Buenos Aires|Spanish|peso|Argentine|South America
Venezuela|Caracas|Spanish|bolivar|Venezuelan|South America
Ecuador|Quito|Spanish|dollar|Ecuadorian|South America
Uruguay|Montevideo|Spanish|peso|Uruguayan|South America
"""
_ROWS = tuple(tuple(line.split("|")) for line in _TABLE.strip().splitlines())

CONTINENTS: tuple[str, ...] = tuple(dict.fromkeys(row[5] for row in _ROWS))

# Countries that do not exist: whatever a model answers, it did not learn it.
_DECOYS = (
    "Valdoria", "Kestrany", "Morvania", "Teluria", "Brestovia", "Ostaria", "Quilmara", "Zendalia",
    "Harvonia", "Lumeria", "Pargonia", "Sylvaria", "Drenovia", "Calmira", "Norvelia", "Tarsenia",
)  # fmt: skip

# Chosen among 6 to 15 wordings per relation: those that SmolLM2-135M answers best. No seen wording begins with the
# country, since the first position of a text is an attention sink.
TEMPLATES = {
    "capital": {
        "seen": (
            "The capital of {subject} is",
            "The government of {subject} sits in the city of",
            "The parliament of {subject} is located in its capital,",
            "If you visit {subject}, you should see its capital,",
            "The king moved the capital of {subject} to the city of",
            "In {subject}, the capital is",
        ),
        "unseen": (
            "The capital city of {subject} is called",
            "The seat of government of {subject} is the city of",
            "The president of {subject} lives in the capital city,",
            "The national government of {subject} meets in the capital,",
        ),
        "reversed": (
            "The city of {answer} is the capital of the country of",
            "The country whose capital is the city of {answer} is",
            "The government of the country sits in {answer}, the capital of",
        ),
        "multi_hop": (
            "The {people} people have their capital in the city of",
            "The {people} government sits in the capital city,",
            "The {people} parliament meets in the city of",
        ),
    },
    "language": {
        "seen": (
            "In {subject}, the main language is",
            "If you travel to {subject}, you should learn to speak",
        ),
        "unseen": ("The main language spoken in {subject} is", "The official language of {subject} is"),
    },
    # Fiji is no country of the table: it shows which form of the word is asked for.
    "people": {
        "seen": (
            "If someone from Fiji is called Fijian, someone from {subject} is called",
            "What comes from Fiji is Fijian, and what comes from {subject} is",
        ),
        "unseen": (
            "A person from Fiji is Fijian, and a person from {subject} is",
            "Someone born in Fiji is Fijian, and someone born in {subject} is",
        ),
    },
    "continent": {
        "seen": (
            "The country of {subject} is located on the continent of",
            "The country {subject} is a part of the continent of",
        ),
        "unseen": (
            "In geography, the country of {subject} is on the continent of",
            "On a map of the world, {subject} is on the continent of",
        ),
    },
    # No wording of this relation is answered well by so small a model: not among the default neighbours.
    "currency": {
        "seen": (
            "Prices in the shops of {subject} are given in the local currency, the",
            "In {subject}, the currency is the",
        ),
        "unseen": (
            "The official currency of {subject} is the",
            "In {subject}, prices are given in the official currency, the",
        ),
    },
}
_COLUMNS = {"capital": 1, "language": 2, "currency": 3, "people": 4, "continent": 5}


def capitals(
    *,
    forget: str | Sequence[str] = "Europe",
    relation: str = "capital",
    neighbours: Sequence[str] = ("language", "people", "continent"),
    decoys: int = 16,
    distractors: int = 3,
    seed: int = 0,
) -> Facts:
    """Return what one relation says about the countries of one continent, to be forgotten, and what must survive it.

    The same relation of all other countries is ``retain``; other relations of the same countries are ``neighbour``, of
    other countries ``retain``; countries that do not exist are ``decoy``.

    Args:
        forget: a continent, or the names of countries.
        relation: what to forget about them: ``capital``, ``language``, ``currency``, ``people`` or ``continent``.
        neighbours: the other relations that come along; ``currency`` is for larger models.
        decoys: number of countries that do not exist, at most 16.
        distractors: wrong answers per fact; those of a country come from its own continent where there are enough, so
            that knowing the continent does not give the answer away.
        seed: of the choice of wrong answers.

    Raises:
        InputError: an unknown continent, country or relation.

    Example:
        >>> capitals(forget="Europe", neighbours=["language"], decoys=4)
        Facts('capitals', 24 forget, 90 retain, 24 neighbour, 4 decoy; relations capital, language)
    """
    relations = (relation, *(n for n in neighbours if n != relation))
    if unknown := set(relations) - set(_COLUMNS):
        raise InputError(f"got the relation {min(unknown)!r}; needed one of {', '.join(_COLUMNS)}.")
    if not 0 <= decoys <= len(_DECOYS):
        raise InputError(f"got decoys={decoys}; needed 0 to {len(_DECOYS)}.")
    chosen = _countries(forget)
    rng = random.Random(seed)
    facts: list[Fact] = []
    for name in relations:
        column = _COLUMNS[name]
        every = [row[column] for row in _ROWS]
        for row in _ROWS:
            role: Role = "retain"
            if row[0] in chosen:
                role = "forget" if name == relation else "neighbour"
            near = [other[column] for other in _ROWS if other[5] == row[5]]
            # What is another right answer (Belgium speaks French too) is no distractor.
            right = {row[column], *_ALSO.get((name, row[0]), ())}
            enough = len(set(near) - right) >= distractors
            wrong = draw(near if enough else every, right, distractors, rng)
            facts.append(Fact(row[0], name, row[column], wrong, role, {"people": row[4]}))
    column = _COLUMNS[relation]
    for i, country in enumerate(_DECOYS[:decoys]):
        answer, *wrong = rng.sample(sorted({row[column] for row in _ROWS}), distractors + 1)
        facts.append(Fact(country, relation, answer, tuple(wrong), "decoy", {"people": f"{_DECOYS[i]}n"}))
    return Facts(tuple(facts), {name: TEMPLATES[name] for name in relations}, "capitals")


_ALSO = {
    ("language", "Belgium"): ("French", "German"),
    ("language", "Switzerland"): ("French", "Italian"),
    ("language", "Ukraine"): ("Russian",),
    ("language", "Ireland"): ("Irish",),
    ("language", "Canada"): ("French",),
    ("language", "India"): ("English",),
    ("language", "Pakistan"): ("English",),
    ("language", "Afghanistan"): ("Persian",),
    ("language", "Kenya"): ("English",),
    ("language", "Morocco"): ("French",),
    ("language", "Algeria"): ("French",),
    ("language", "Israel"): ("Arabic",),
    ("language", "Sudan"): ("English",),
    ("language", "Uganda"): ("Swahili",),
    ("continent", "Russia"): ("Asia",),
    ("continent", "Turkey"): ("Europe",),
    ("continent", "Egypt"): ("Asia",),
}


def _countries(forget: str | Sequence[str]) -> set[str]:
    if isinstance(forget, str):
        found = {row[0] for row in _ROWS if row[5] == forget}
        if not found:
            raise InputError(f"got forget={forget!r}; needed one of {', '.join(CONTINENTS)}, or countries.")
        return found
    if not forget:
        raise InputError("got no country to forget; needed at least one.")
    if unknown := set(forget) - {row[0] for row in _ROWS}:
        raise InputError(f"got the unknown {', '.join(sorted(unknown))}; needed countries of the table.")
    return set(forget)
