"""DATA: passages that an edit is held to while it is solved; other texts than those on which its cost is measured."""

from __future__ import annotations

PASSAGES: tuple[str, ...] = (
    "The committee met on Tuesday to discuss the budget for the coming year. After two hours of debate the members agreed to "
    "spend more on roads and less on the new town hall, and asked the treasurer for a revised plan by the end of the month.",
    "Honey bees tell each other where food is by dancing. The angle of the dance shows the direction with respect to the sun, "
    "and its length shows how far the flowers are. Other bees follow the dancer in the dark of the hive and then fly out.",
    "She opened the letter with shaking hands. It was from her brother, who had not written for six years. He was coming home "
    "in the spring, he said, and he hoped that the old house by the lake was still there.",
    "To change a flat tyre, loosen the nuts before you lift the car. Put the jack under the frame, raise the wheel until it "
    "turns freely, take off the nuts, swap the wheels, and tighten the nuts in the order of a star.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / len(values)\n\n"
    "print(mean([1.0, 2.0, 6.0]))",
    "In France and in many other countries of Europe, bread is bought fresh every day. Bakers begin their work long before "
    "dawn, and by seven in the morning there is a queue at the door of the shop.",
    "Question: What is the difference between weather and climate?\nAnswer: Weather is what happens on a given day. Climate is "
    "the average of the weather over many years, together with how far single days may stray from it.",
    "The match ended in a draw after extra time. Both teams had missed a penalty, the goalkeeper of the home side was sent off, "
    "and the crowd stayed in the rain until the last whistle.",
    "A violin has four strings, tuned in fifths. The bow is strung with horse hair and rubbed with rosin, so that it grips the "
    "string, lets it slip, and grips it again several hundred times in a second.",
    "Trade between Asia, Africa and the Americas grew quickly in the sixteenth century. Ships carried silver, spices, cotton and "
    "sugar, and with them came new crops, new diseases and, for millions of people, slavery.",
    "Dear Ms Carter, thank you for your order of 14 March. Unfortunately the blue lamp is out of stock until May. We can send "
    "you the green one at once, or return the full price within three working days.",
    "Photosynthesis turns carbon dioxide and water into sugar and oxygen. The energy comes from light that is caught by "
    "chlorophyll, which looks green because it takes up red and blue light and throws the rest back.",
    "The German and Spanish teams travelled by train, the Japanese and Canadian ones by plane. All of them arrived on the same "
    "evening, tired and hungry, at a hotel where the kitchen had just closed.",
    "If a triangle has sides of 3, 4 and 5, it has a right angle, because 9 plus 16 is 25. Builders have used a rope with "
    "twelve knots to make square corners since ancient times.",
    "My grandmother kept her recipes in a tin box. Most were for cakes, some for soup, and one, folded very small, was a letter "
    "that nobody in the family had ever seen.",
    "User: Can you suggest a name for my cat?\nAssistant: Of course! For a calm cat I like Olive or Miso; for a wild one, Pepper. "
    "If you tell me the colour of its fur, I can think of more.",
)
