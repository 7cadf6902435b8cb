"""DATA: neutral passages, written for this package, on which an edit should cost nothing."""

from __future__ import annotations

NEUTRAL: tuple[str, ...] = (
    "Granite forms when magma cools slowly below the surface of the earth. The slow cooling lets large crystals of quartz, "
    "feldspar and mica grow, which is why the rock looks speckled. Because it is hard and resists weather, granite has been "
    "used for bridges, paving stones and monuments for thousands of years.",
    "To make a simple tomato soup, heat two spoons of oil in a pot and add one chopped onion. When the onion is soft, add the "
    "tomatoes, a little salt and a cup of water. Let it simmer for twenty minutes, then blend it until it is smooth and serve "
    "it with bread.",
    "The water cycle has no beginning and no end. Water evaporates from the sea, rises, cools, and forms clouds. When the drops "
    "are heavy enough they fall as rain or snow. Some of the water sinks into the ground, and the rest flows through rivers "
    "back to the sea.",
    "A bicycle chain should be cleaned every few weeks, and more often after riding in the rain. Wipe off the old oil with a "
    "dry cloth, put one small drop of fresh oil on every link, turn the pedals backwards a few times, and wipe off what is left.",
    "The speed of sound in air is about 340 meters per second and depends on temperature. Light is almost a million times "
    "faster. That is why the flash of a distant storm is seen before the thunder is heard: every three seconds between them "
    "mean about one kilometer.",
    "In mathematics, a prime number is a whole number greater than one that has no divisors other than one and itself. The "
    "first primes are 2, 3, 5, 7 and 11. There are infinitely many of them, which was already known in ancient Greece.",
    "The old lighthouse stands on a cliff at the northern end of the island. Its lamp was first lit in 1862 and burned oil "
    "until 1931, when electric power arrived. Today the light works without a crew, and the tower is open on summer weekends.",
    "Bread rises because yeast turns sugar into gas. The gas is held in small bubbles by gluten, a net of proteins that forms "
    "when flour and water are kneaded. If the dough is too warm, the yeast works too fast and the loaf has large holes.",
    "A sorting algorithm puts the elements of a list into order. Some algorithms are easy to understand but slow on long lists, "
    "while others need more memory and are much faster. Which one is best depends on the size of the data and on how it is stored.",
    "The city lies on both banks of a wide river. Five bridges connect the old quarter, with its narrow streets and markets, to "
    "the modern district in the south. In spring the river often floods the lower road, and buses take another route.",
    "Copper is one of the few metals that occur in nature in usable form. It conducts heat and electricity well, so it is used "
    "for wires, pipes and pans. When it is exposed to air and rain for many years, its surface turns green.",
    "The train to the coast leaves every hour from platform four. The journey takes about ninety minutes and follows the valley "
    "for most of the way. Tickets can be bought at the station or online, and there is a discount on weekends.",
    "Volcanic soil is rich in minerals and holds water well. For this reason many farms lie on the slopes of volcanoes in spite "
    "of the danger. Coffee, grapes and potatoes grow well there, and harvests are larger than in the plains.",
    "The museum opens at nine in the morning and closes at six. The ground floor shows tools and pottery from the bronze age, "
    "and the first floor is used for exhibitions that change every three months. Entry is free on the first Sunday of the month.",
    "Bees find their way by the position of the sun. Even when the sky is cloudy, they can use the pattern of polarized light. "
    "After a good find of flowers, a dance in the hive shows the others the direction and the distance.",
    "Before painting a wall, remove dust and old paint, fill the holes, and let everything dry. A first thin coat helps the "
    "color to stick. Two thin coats last longer and look more even than a single thick one.",
    "The moon turns around its own axis in the same time that it needs for one orbit, so the same side always faces the earth. "
    "The far side was first photographed by a space probe in 1959. It has more craters and fewer dark plains.",
    "Glass is made by melting sand with soda and lime at about 1500 degrees. While it is hot it can be blown, pressed or drawn "
    "into threads. It must then cool slowly, because tension inside the material would make it crack.",
    "A good map shows only what is needed. Roads are drawn much wider than they are, small bends are left out, and names are "
    "placed where they do not cover anything important. Every map is a choice between detail and clarity.",
    "Rice is the main food of more than half of the people on earth. Most of it grows in flooded fields, which keeps weeds away. "
    "A field needs about four months from planting to harvest, depending on the variety and the climate.",
)
