"""DATA: content words of the built-in contrasts, in 16 blocks that have no content word in common.

A block is what `split` holds out, so a probe that succeeds on a held-out block has met none of its
occupations, names, verbs, objects, places or times. The n-th female and the n-th male first name of a block
make a pair: about equally common, and as far as possible equally long in the byte-pair vocabularies of
current models, so that neither rarity nor the number of tokens gives the class away. To add a block, append a row; the tests check that it shares no word.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BLOCKS", "Block", "Verb"]


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb in the five forms that frames use, and things that people do it to.

    Attributes:
        base: "write".
        present: third person singular, "writes".
        past: "wrote".
        participle: past participle, "written".
        gerund: "writing".
        objects: noun phrases that go with it, "letters".
    """

    base: str
    present: str
    past: str
    participle: str
    gerund: str
    objects: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Content words that are held out together.

    Attributes:
        occupations: singular nouns for people, of either gender.
        female: first names of women, as common as the male ones.
        male: first names of men.
        surnames: surnames.
        verbs: transitive verbs, none of which has the same form in past and present.
        places: place phrases of three words or more.
        times: phrases that say when, and fit the past as well as the present.
    """

    occupations: tuple[str, ...]
    female: tuple[str, ...]
    male: tuple[str, ...]
    surnames: tuple[str, ...]
    verbs: tuple[Verb, ...]
    places: tuple[str, ...]
    times: tuple[str, ...]


def _verb(line: str) -> Verb:
    """Parse "write writes wrote written writing: letters / notes"; a regular verb gives its base only."""
    forms, objects = line.split(": ")
    given = forms.split()
    base, present, past, participle, gerund = given if len(given) > 1 else _regular(given[0])
    return Verb(base, present, past, participle, gerund, tuple(objects.split(" / ")))


def _regular(base: str) -> list[str]:
    # Verbs that double their last consonant (wrap, scrub) are written out in the table.
    stem, y = base[:-1], base[-1] == "y" and base[-2] not in "aeiou"
    if y:
        present, past = f"{stem}ies", f"{stem}ied"
    else:
        present = base + ("es" if base.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")
        past = base + ("d" if base.endswith("e") else "ed")
    gerund = (stem if base.endswith("e") else base) + "ing"
    return [base, present, past, past, gerund]


def _block(
    *, occupations: str, female: str, male: str, surnames: str, verbs: str, places: str, times: str
) -> Block:
    def listed(text: str) -> tuple[str, ...]:
        return tuple(" ".join(item.split()) for item in text.split(","))

    return Block(
        occupations=listed(occupations),
        female=listed(female),
        male=listed(male),
        surnames=listed(surnames),
        verbs=tuple(_verb(line.strip()) for line in verbs.strip().splitlines()),
        places=listed(places),
        times=listed(times),
    )


BLOCKS: tuple[Block, ...] = (
    _block(
        occupations="baker, nurse, engineer, librarian, plumber, judge, florist, pilot, accountant, painter",
        female="Mary, Emma, Olivia, Sophia, Isabella, Charlotte, Amelia, Emily, Abigail, Elizabeth",
        male="James, Robert, Michael, William, David, Richard, Joseph, Thomas, Charles, Daniel",
        surnames="Johnson, Rodriguez, Nguyen, Bennett, Murphy, Simmons",
        verbs="""
            write writes wrote written writing: letters / limericks
            paint: wooden signs / picture frames
            carry: heavy boxes / lanterns
            fold: blankets / napkins
            wash: dishes / coffee cups
            count: coins / lottery tickets
            feed feeds fed fed feeding: pigeons / stray cats
            hang hangs hung hung hanging: curtains / wet towels
            open: parcels / windows
            sharpen: pencils / pocket knives
        """,
        places="""
            at the station, in the courtyard, near the fountain, behind the warehouse,
            outside the theater, beside the river
        """,
        times="before breakfast, at noon, after the concert, during the festival",
    ),
    _block(
        occupations="""
            athlete, carpenter, surgeon, secretary, farmer, poet, receptionist, mechanic, lawyer,
            cleaner
        """,
        female="Patricia, Linda, Barbara, Susan, Jessica, Karen, Sarah, Nancy, Lisa, Margaret",
        male="Matthew, Anthony, Donald, Steven, Paul, Andrew, Joshua, Kenneth, Kevin, Brian",
        surnames="Smith, Garcia, Peterson, Coleman, Alvarez, Sullivan",
        verbs="""
            sell sells sold sold selling: novels / wicker chairs
            draw draws drew drawn drawing: street maps / diagrams
            clean: boots / dusty shelves
            polish: silver spoons / mirrors
            serve: warm soup / corn bread
            stack: crates / firewood
            measure: ropes / planks
            wrap wraps wrapped wrapped wrapping: presents / sandwiches
            mend: torn shirts / socks
            water: orchids / tomato seedlings
        """,
        places="""
            in the library, at the market, near the lighthouse, behind the barn, outside the cinema,
            beside the lake
        """,
        times="after lunch, at dawn, before the parade, during the storm",
    ),
    _block(
        occupations="""
            dentist, electrician, nanny, firefighter, historian, cashier, soldier, editor, stylist,
            chemist
        """,
        female="Betty, Sandra, Jennifer, Michelle, Amanda, Melissa, Deborah, Stephanie, Rebecca, Laura",
        male="George, Timothy, Ronald, Edward, Jason, Jeffrey, Gary, Jacob, Nicholas, Eric",
        surnames="Watkins, Martinez, Anderson, Patterson, Hughes, Chavez",
        verbs="""
            send sends sent sent sending: postcards / invitations
            repair: bicycles / broken clocks
            sort: buttons / colored beads
            grind grinds ground ground grinding: pepper / sausage meat
            taste: cheeses / local wines
            collect: bottle caps / seashells
            tie ties tied tied tying: ribbons / knots
            peel: potatoes / ripe oranges
            record: podcasts / bird songs
            light lights lit lit lighting: candles / oil lamps
        """,
        places="""
            in the museum, at the harbor, near the cathedral, behind the bakery, outside the stadium,
            beside the canal
        """,
        times="in the evening, before the meeting, after the lecture, during the auction",
    ),
    _block(
        occupations="""
            doctor, welder, babysitter, economist, tailor, teacher, caregiver, butcher, translator,
            sculptor
        """,
        female="Sharon, Carol, Kathleen, Amy, Angela, Ellen, Joan, Nicole, Katherine, Samantha",
        male="Jonathan, Stephen, Larry, Justin, Scott, Frank, Benjamin, Samuel, Gregory, Alexander",
        surnames="Brown, Hernandez, Thompson, Jenkins, Flores, Watson",
        verbs="""
            buy buys bought bought buying: vegetables / cheap radios
            load: suitcases / carts
            iron: tablecloths / linen trousers
            play: chess / backgammon
            teach teaches taught taught teaching: geometry / Spanish
            chop chops chopped chopped chopping: onions / celery
            label: jars / cassettes
            fix: doorbells / leaky faucets
            brush: ponies / wigs
            dry: herbs / mushrooms
        """,
        places="""
            in the workshop, at the airport, near the playground, behind the clinic,
            outside the courthouse, under the bridge
        """,
        times="in the morning, before the wedding, after the race, during the strike",
    ),
    _block(
        occupations="""
            architect, hairdresser, photographer, pharmacist, magician, sheriff, tutor, gardener,
            politician, dietitian
        """,
        female="Christine, Janet, Anne, Catherine, Maria, Heather, Diane, Ruth, Julie, Joyce",
        male="Raymond, Patrick, Jack, Dennis, Tyler, Aaron, Jose, Adam, Nathan, Henry",
        surnames="Jones, Lopez, Robinson, Barnes, Ortiz, Henderson",
        verbs="""
            build builds built built building: birdhouses / toy ships
            photograph: butterflies / parrots
            carve: pumpkins / marble
            throw throws threw thrown throwing: darts / tennis balls
            cook: noodles / rice
            study: fossils / legal documents
            mix: cocktails / cement
            hide hides hid hidden hiding: chocolate bars / diaries
            type: memos / transcripts
            print: brochures / flyers
        """,
        places="""
            in the basement, at the campsite, near the windmill, behind the chapel, outside the embassy,
            beside the pond
        """,
        times="after dinner, at midnight, before the interview, during the tour",
    ),
    _block(
        occupations="""
            scientist, housekeeper, bricklayer, psychologist, novelist, detective, manicurist,
            programmer, shepherd, senator
        """,
        female="Virginia, Victoria, Judith, Martha, Teresa, Marie, Wendy, Judy, Ann, Hannah",
        male="Douglas, Karl, Peter, Ryan, Walter, Ethan, Jeremy, Harold, Keith, Roger",
        surnames="Davis, Gonzalez, Clark, Myers, Rivera, Collins",
        verbs="""
            sew sews sewed sewn sewing: costumes / quilts
            copy: recipes / blueprints
            deliver: newspapers / groceries
            ride rides rode ridden riding: horses / scooters
            plant: tulips / bushes
            roll: barrels / carpets
            test: batteries / smoke alarms
            weigh: apples / flour sacks
            answer: phone calls / survey questions
            varnish: cabinets / canoes
        """,
        places="""
            in the hallway, at the hotel, near the monument, behind the gymnasium, outside the pharmacy,
            beside the orchard
        """,
        times="in the afternoon, at sunset, after the recital, during the summer",
    ),
    _block(
        occupations="""
            chef, roofer, therapist, astronaut, typist, jeweler, banker, coach, potter, veterinarian
        """,
        female="Diana, Kate, Rose, Julia, Sara, Grace, Alice, Anna, Rachel, Sally",
        male="Gerald, Carl, Arthur, Lawrence, Albert, Joe, Bruce, Gabriel, Bryan, Juan",
        surnames="Wilson, Perez, Harris, Butler, Gutierrez, Foster",
        verbs="""
            make makes made made making: puppets / bracelets
            catch catches caught caught catching: trout / fireflies
            pack: backpacks / picnic baskets
            boil: eggs / lobsters
            press: flowers / grapes
            trim trims trimmed trimmed trimming: sideburns / bonsai trees
            embroider: handkerchiefs / pillowcases
            inspect: ladders / elevators
            sweep sweeps swept swept sweeping: porches / chimneys
            stamp: passports / envelopes
        """,
        places="""
            in the kitchen, at the hospital, near the waterfall, behind the cottage, outside the bank,
            beside the meadow
        """,
        times="after supper, before the exam, during the winter, after the ceremony",
    ),
    _block(
        occupations="""
            reporter, designer, optician, violinist, guard, paramedic, governor, ranger, statistician,
            beautician
        """,
        female="Lucy, Sophie, Claire, Caroline, Ella, Ruby, Lily, Esther, Daisy, Eva",
        male="Louis, Philip, Russell, Vincent, Roy, Bobby, Eugene, Ralph, Mason, Simon",
        surnames="Jackson, Sanchez, Wright, Hamilton, Vasquez, Perry",
        verbs="""
            choose chooses chose chosen choosing: neckties / prizes
            assemble: bookcases / puzzles
            slice: cucumbers / lemons
            translate: menus / folk tales
            bend bends bent bent bending: wires / horseshoes
            spin spins spun spun spinning: wool / cotton thread
            rinse: spinach / lettuce
            rent: boats / tuxedos
            design: logos / necklaces
            borrow: calculators / wrenches
        """,
        places="""
            in the attic, at the university, near the observatory, behind the supermarket,
            outside the aquarium, beside the creek
        """,
        times="in the spring, before the vote, after the party, during the trial",
    ),
    _block(
        occupations="""
            professor, janitor, illustrator, ambassador, trucker, hygienist, pianist, locksmith, curator,
            sailor
        """,
        female="Vera, Eleanor, Nina, Clara, Louise, Ada, Eliza, Naomi, Edith, Holly",
        male="Lucas, Oliver, Elijah, Isaac, Max, Leo, Felix, Hugo, Oscar, Victor",
        surnames="Moore, Ramirez, Campbell, Griffin, Mendoza, Ward",
        verbs="""
            drive drives drove driven driving: tractors / vans
            bake: muffins / pies
            fill: buckets / inkwells
            inflate: balloons / rubber rafts
            edit: essays / short videos
            scrub scrubs scrubbed scrubbed scrubbing: pots / floor mats
            steam: dumplings / milk
            drop drops dropped dropped dropping: pebbles / marbles
            fly flies flew flown flying: kites / paper airplanes
            remove: stains / rusty nails
        """,
        places="""
            in the garage, at the farmhouse, near the pier, behind the temple, outside the casino,
            under the archway
        """,
        times="at sunrise, before the game, after the flood, during the break",
    ),
    _block(
        occupations="""
            manager, decorator, physicist, blacksmith, stenographer, referee, biologist, barber,
            playwright, mayor
        """,
        female="Fatima, Aisha, Layla, Amina, Leila, Samira, Maryam, Nadia, Zainab, Khadija",
        male="Mustafa, Khalid, Karim, Rashid, Jamal, Samir, Hamid, Bilal, Tariq, Yusuf",
        surnames="Haddad, Rahman, Siddiqui, Farouk, Nasser, Malik",
        verbs="""
            lay lays laid laid laying: tiles / floorboards
            tune: harps / banjos
            crush: walnuts / ice cubes
            sketch: ruins / skylines
            film: squirrels / swans
            shake shakes shook shaken shaking: rugs / dice
            glue: vases / cardboard models
            keep keeps kept kept keeping: receipts / hamsters
            melt: butter / wax
            arrange: bouquets / dominoes
        """,
        places="""
            in the lobby, at the inn, near the castle, behind the factory, outside the arena,
            beside the railroad
        """,
        times="in the fall, before bedtime, after the funeral, during the harvest",
    ),
    _block(
        occupations="""
            miner, plasterer, counselor, auditor, choreographer, sergeant, dermatologist, grocer, clerk,
            singer
        """,
        female="Rosa, Ana, Isabel, Sofia, Lucia, Camila, Valentina, Elena, Daniela, Mariana",
        male="Pedro, Carlos, Luis, Miguel, Javier, Rafael, Emilio, Ricardo, Eduardo, Raul",
        surnames="Gomez, Torres, Castillo, Morales, Delgado, Herrera",
        verbs="""
            sing sings sang sung singing: hymns / ballads
            fry: fish / bananas
            mail: packages / tax forms
            shovel: snow / gravel
            blow blows blew blown blowing: whistles / soap bubbles
            hammer: copper / tent pegs
            review: budgets / scripts
            plan plans planned planned planning: road trips / family reunions
            rewrite rewrites rewrote rewritten rewriting: summaries / lyrics
            pour: tea / lemonade
        """,
        places="""
            in the cafeteria, at the dormitory, near the dam, behind the stables, outside the ballroom,
            beside the shore
        """,
        times="at dusk, before the journey, after the banquet, during the debate",
    ),
    _block(
        occupations="""
            journalist, glazier, pediatrician, broker, lifeguard, interpreter, geologist, courier,
            bookkeeper, comedian
        """,
        female="Jane, Helen, Dorothy, Jenny, Alison, Monica, Harriet, Jill, Erin, Lynn",
        male="Ian, Graham, Colin, Neil, Alan, Martin, Craig, Stuart, Kurt, Glenn",
        surnames="Norris, Gray, Reed, Fletcher, Barton, Lambert",
        verbs="""
            wear wears wore worn wearing: helmets / sandals
            bury: acorns / time capsules
            toast: bagels / marshmallows
            dig digs dug dug digging: holes / clams
            unload: pallets / furniture
            scan scans scanned scanned scanning: barcodes / fingerprints
            season: steaks / stews
            pay pays paid paid paying: bills / fines
            display: trophies / antiques
            pull: wagons / sleds
        """,
        places="""
            in the laboratory, at the resort, near the quarry, behind the tavern, outside the palace,
            beside the laundromat
        """,
        times="during the night, before the show, after the inspection, before the deadline",
    ),
    _block(
        occupations="""
            analyst, dancer, mathematician, nutritionist, weaver, philosopher, upholsterer, diplomat,
            radiologist, barista
        """,
        female="Ingrid, Elsa, Greta, Sigrid, Freya, Helga, Annika, Britta, Solveig, Linnea",
        male="Axel, Sven, Johan, Bjorn, Anders, Gunnar, Henrik, Magnus, Nils, Olaf",
        surnames="Larsen, Lindberg, Hansen, Olsen, Berg, Dahl",
        verbs="""
            weave weaves wove woven weaving: tapestries / hammocks
            mark: calendars / boundary stones
            rehearse: dialogues / dance steps
            eat eats ate eaten eating: pancakes / cherries
            empty: ashtrays / trash cans
            decorate: cookies / masks
            explain: rules / fractions
            spray: perfume / insect repellent
            describe: volcanoes / hurricanes
            stir stirs stirred stirred stirring: batter / oatmeal
        """,
        places="""
            in the classroom, at the zoo, near the reservoir, behind the diner, outside the gallery,
            beside the cemetery
        """,
        times="after the rehearsal, before the match, during the holidays, during the blackout",
    ),
    _block(
        occupations="""
            consultant, surveyor, cardiologist, usher, drummer, notary, composer, boxer, herbalist,
            caterer
        """,
        female="Katie, Molly, Tara, Maya, Allison, Savannah, Mia, Annie, Ivy, Juliet",
        male="Luke, Noah, Wesley, Sean, Seth, Marcus, Spencer, Cole, Adrian, Owen",
        surnames="Evans, Reyes, Hall, Stewart, Powell, Jennings",
        verbs="""
            grow grows grew grown growing: basil / zucchini
            compose: melodies / waltzes
            squeeze: limes / sponges
            distribute: pamphlets / vaccines
            check: thermometers / bus schedules
            cover: sofas / statues
            bind binds bound bound binding: manuscripts / ledgers
            fetch: stools / mops
            restore: murals / carriages
            juggle: pineapples / torches
        """,
        places="""
            in the pavilion, at the ranch, near the tunnel, behind the greenhouse, outside the mall,
            beside the swimming pool
        """,
        times="after the speech, before the tournament, during the conference, after dark",
    ),
    _block(
        occupations="""
            machinist, umpire, astronomer, beekeeper, podiatrist, cyclist, proofreader, brewer, lecturer,
            oceanographer
        """,
        female="Francesca, Chiara, Martina, Federica, Silvia, Paola, Lorenza, Carla, Giovanna, Elisa",
        male="Paolo, Stefano, Luca, Roberto, Angelo, Dario, Pietro, Alberto, Claudio, Massimo",
        surnames="Rossi, Bianchi, Romano, Ferrari, Conti, Moretti",
        verbs="""
            freeze freezes froze frozen freezing: berries / leftovers
            burn: incense / driftwood
            organize: files / charity raffles
            drag drags dragged dragged dragging: anchors / hay bales
            clip clips clipped clipped clipping: fingernails / hedges
            examine: seeds / crystals
            sand: tabletops / skateboards
            brew: beer / ginger ale
            store: trumpets / ski jackets
            launch: rockets / drones
        """,
        places="""
            in the conservatory, at the monastery, near the border, behind the sawmill,
            outside the post office, beside the marina
        """,
        times="during the reception, after the earthquake, before the voyage, at daybreak",
    ),
    _block(
        occupations="""
            researcher, goldsmith, neurologist, cartoonist, porter, realtor, zookeeper, linguist,
            archivist, acrobat
        """,
        female="Priya, Asha, Deepa, Lakshmi, Meera, Nisha, Pooja, Radha, Sunita, Usha",
        male="Rahul, Arjun, Vikram, Rajesh, Ajay, Anil, Ravi, Ashok, Amit, Vijay",
        surnames="Patel, Sharma, Gupta, Reddy, Iyer, Mehta",
        verbs="""
            string strings strung strung stringing: pearls / popcorn
            strum strums strummed strummed strumming: guitars / ukuleles
            whisper: prayers / spells
            solve: riddles / equations
            order: pizza / fabrics
            stitch: leather / badges
            heat: lasagna / glass tubes
            shred shreds shredded shredded shredding: cabbage / invoices
            memorize: poems / capitals
            hoist: flags / sails
        """,
        places="""
            in the village square, at the shelter, near the cliff, behind the mansion,
            outside the nightclub, beside the parking lot
        """,
        times="during the intermission, after the graduation, before the fireworks, at nightfall",
    ),
)
