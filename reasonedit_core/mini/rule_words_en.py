"""English words of the rules: what can be supposed ("what if ..."), and what can be asked for. Slots: see `rules.Setting`."""

from __future__ import annotations

LIKE = {
    "red": ("a ripe tomato", "fresh blood", "a fire engine"),
    "orange": ("a carrot", "a ripe pumpkin", "a mandarin"),
    "yellow": ("a ripe lemon", "a sunflower", "the yolk of an egg"),
    "green": ("a frog", "fresh grass", "a cucumber"),
    "blue": ("the deep sea", "a clear sky", "a sapphire"),
    "purple": ("an aubergine", "a ripe plum", "lavender"),
}

RULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "next_season": (
        ("three months go by", "the next season comes", "we come back one season later"),
        ("let one season pass", "show the tree a quarter of a year later"),
    ),
    "burns_down": (
        ("nobody blows it out for many hours", "the flame has eaten all its wax", "it stays lit the whole night"),
        ("let the flame run out of wax", "show it when the wax is used up"),
    ),
    "bud_opens": (
        ("a few warm days go by", "it comes into bloom", "spring goes on for another week"),
        ("give the flower a few more days of spring", "show the flower in full bloom"),
    ),
    "half_melted": (
        ("it has been out of the freezer for a few minutes", "the ice has just begun to melt", "the room is a little warm"),
        ("let the ice begin to melt", "show the ice after a few minutes in a warm room"),
    ),
    "three_hours": (
        ("three hours go by on the clock", "it is three hours later", "the clock runs on for three hours"),
        ("let three hours pass", "show the clock three hours later"),
    ),
    "half_a_day": (
        ("six hours go by on the clock", "it is six hours later", "the clock runs on for half of its dial"),
        ("let six hours pass", "show the clock six hours later"),
    ),
    "hours_pass": (
        ("the sky is seen some hours later", "the next part of the day begins", "the sky turns to the next time of day"),
        ("let the day go on to its next part", "show the next time of day"),
    ),
    "no_water": (
        ("nobody waters the flower for two weeks", "the flower gets no water any more", "the gardener forgets the flower"),
        ("let the flower go without water", "show what thirst does to the flower"),
    ),
    "drought": (
        ("a long drought comes", "the leaf has lost all its water", "the leaf lies in the heat for weeks"),
        ("let all the water leave the leaf", "show the leaf after a long drought"),
    ),
    "potassium": (
        ("the soil has no potassium", "the leaf lacks potassium", "the plant gets too little potassium"),
        ("show what a lack of potassium does to the leaf", "give the leaf the signs of too little potassium"),
    ),
    "fertiliser": (
        ("the plant gets the potassium that it lacks", "the soil is given a good fertiliser", "the leaf is cured of its lack"),
        ("cure the leaf of its lack of potassium", "show the leaf after a good fertiliser"),
    ),
    "sun_melts": (
        ("the ice stays in the sun for an hour", "the hottest noon of the year comes", "the ice lies beside a hot stove"),
        ("leave the ice in the sun for an hour", "let the heat have its way with the ice"),
    ),
    "frost": (
        ("it spends the night in the freezer", "a hard frost comes", "the water gets far below zero"),
        ("put the water into the freezer for a night", "let a hard frost come"),
    ),
    "egg_falls": (
        ("the egg falls on a stone floor", "somebody drops the egg", "a hammer hits the egg"),
        ("drop the egg from the roof", "let the cook hit the egg on the edge of the pan"),
    ),
    "needle": (
        ("a needle touches the balloon", "the balloon meets a cactus", "somebody blows far too much air into it"),
        ("stick a needle into the balloon", "show the balloon after it has met a sharp thorn"),
    ),
    "let_go": (
        ("the child lets go of the balloon", "the string of the balloon is cut", "nothing holds the balloon down"),
        ("let go of the balloon", "show where the balloon is once nobody holds its string"),
    ),
    "drunk_up": (
        ("somebody drinks all the coffee", "a thirsty guest was here", "the coffee is drunk to the last drop"),
        ("drink up the coffee", "show the cup after breakfast"),
    ),
    "refill": (
        ("the guest asks for another coffee", "the waiter pours new coffee", "somebody makes fresh coffee"),
        ("pour new coffee", "serve the guest another coffee"),
    ),
    "rain": (
        ("it begins to rain", "dark clouds bring a shower", "drops fall on the walker"),
        ("keep the walker dry in the rain", "get ready for a shower"),
    ),
    "rain_stops": (
        ("the rain stops", "the walker gets home", "no drop falls any more"),
        ("put the umbrella away after the rain", "show how it is carried when it does not rain"),
    ),
    "power_cut": (
        ("there is a power cut", "somebody pulls the plug", "the whole house has no electricity"),
        ("pull the plug", "save electricity"),
    ),
    "too_dark": (
        ("somebody wants to read in the dark", "it gets too dark to read", "the reader opens a book at night"),
        ("give me some light to read by", "chase the darkness from the desk"),
    ),
    "birthday": (
        ("somebody strikes a match for the birthday", "the birthday begins", "a match is held to the wick"),
        ("get it ready for the birthday song", "hold a match to the wick"),
    ),
    "cars_go": (
        ("the cars may go", "the drivers are allowed to start", "the road is free for the cars"),
        ("let the cars go", "end the wait of the drivers"),
    ),
    "child_crosses": (
        ("the cars have to wait", "a child has to cross the road", "the drivers must stop"),
        ("stop the cars for the child", "make the drivers wait"),
    ),
    "lights_change": (
        ("the lights move on by one step", "the traffic light changes once", "the next phase of the lights begins"),
        ("switch the lights on to their next phase", "show the step that follows in the lights"),
    ),
    "moon_wanes": (
        ("ten days go by and the moon wanes", "the moon is nearly new", "most of the moon lies in the shadow"),
        ("let the moon wane", "show the moon shortly before new moon"),
    ),
    "grown_up": (
        ("twenty years go by", "the little tree grows up", "the tree has had many years to grow"),
        ("let the tree grow up", "show the tree as our grandchildren will see it"),
    ),
    "drives_off": (
        ("the car drives off into the distance", "the car is seen from far away", "the car is a mile further on"),
        ("let the car drive off into the distance", "show the car when it is far away"),
    ),
    "comes_near": (
        ("the car comes towards us", "the car is seen from close by", "the car stops right before us"),
        ("let the car come near", "show the car when it is close to us"),
    ),
    "night_falls": (
        ("night falls", "it is midnight", "we wait until all the world sleeps"),
        ("let night fall", "show what stands in the sky at midnight"),
    ),
    "sun_rises": (
        ("the night is over", "it is noon on a fine day", "a new morning has come"),
        ("end the night", "show what stands in the sky at noon"),
    ),
    "picnic": (
        ("we have a picnic outdoors", "all of this lies in the country", "everything is taken to where cows graze"),
        ("take everything to where cows graze", "get this ready for a picnic in the country"),
    ),
    "dinner": (
        ("all of this is served for dinner", "everything lies where people eat", "a carpenter made what is under it"),
        ("serve all of this for dinner", "put everything where people eat"),
    ),
    "likeness": (
        ("{the} has the colour of {like}", "{the} looks as if dipped in the colour of {like}", "{the} is as bright as {like}"),
        ("give {the} the colour of {like}", "let {the} take after {like}"),
    ),
    "mixture": (
        ("{the} is painted with a mixture of {colour_a} and {colour_b}", "{colour_a} and {colour_b} run together on {the}"),
        ("mix {colour_a} and {colour_b} and paint {the} with it", "give {the} what {colour_a} and {colour_b} make together"),
    ),
    "opposite_colour": (
        ("{the} has the opposite colour of now", "{the} changes to the other side of the colour wheel"),
        ("give {the} its complementary colour", "turn the colour of {the} into its opposite on the colour wheel"),
    ),
    "next_colour": (
        ("{the} goes one step on in the rainbow", "{the} gets the colour that follows in the rainbow"),
        ("give {the} the next colour of the rainbow", "move {the} on by one colour of the rainbow"),
    ),
    "mirror": (
        ("{the} stands where a mirror in the middle shows it", "{the} changes sides, left for right"),
        ("put {the} where its mirror image would be", "let {the} change to the other side of the same row"),
    ),
    "centre": (
        ("{the} is the centre of attention", "everything turns around {the}"),
        ("give {the} the place of honour", "make {the} the heart of the picture"),
    ),
    "across": (
        ("{the} crosses the whole picture from corner to corner", "{the} is as far from its corner as it can be"),
        ("send {the} to the opposite corner", "let {the} cross the picture from corner to corner"),
    ),
    "alone": (
        ("{the} is the last thing on earth", "{the} has no company at all"),
        ("leave {the} all alone", "keep nothing but {the}"),
    ),
    "like_largest": (
        ("all {kinds_a} have the colour of the largest {kind_b}", "the largest {kind_b} lends its colour to all {kinds_a}"),
        (
            "give all {kinds_a} the colour of the largest {kind_b}",
            "let the largest {kind_b} decide how all {kinds_a} are coloured",
        ),
    ),
    "odd_colour": (
        ("all three shapes wear the same colour", "no shape stands out by its colour", "the odd one matches the other two"),
        ("let the odd one out match the other two", "correct the colour that does not fit in"),
    ),
    "odd_size": (
        ("all three shapes are of one size", "no shape stands out by its size", "the odd one has the size of the other two"),
        ("give the odd one out the size of the other two", "correct the size that does not fit in"),
    ),
    "swap_colours": (
        ("{the_a} and {the_b} trade their colours", "each of {the_a} and {the_b} has the colour of the other"),
        ("swap the colours of {the_a} and {the_b}", "let {the_a} and {the_b} trade their colours"),
    ),
    "swap_sizes": (
        ("{the_a} and {the_b} trade their sizes", "each of {the_a} and {the_b} has the size of the other"),
        ("swap the sizes of {the_a} and {the_b}", "let {the_a} and {the_b} trade their sizes"),
    ),
    "corners": (
        ("everything with corners is gone", "only round things may stay", "nothing sharp is left"),
        ("take away all that has corners", "keep what is round and nothing else"),
    ),
    "growing": (
        ("only what grows may stay", "everything without leaves and roots is gone", "only plants are left"),
        ("keep what a gardener cares for and nothing else", "take away all that does not grow"),
    ),
    "more_than": (
        (
            "{the} goes when there are more {kinds_a} than {kinds_b} and gets {colour_c} when not",
            "{the} must leave if {kinds_a} outnumber {kinds_b} and else is {colour_c}",
        ),
        (
            "take away {the} if there are more {kinds_a} than {kinds_b}, or else paint it {colour_c}",
            "count {kinds_a} and {kinds_b}, and if there are more {kinds_a} remove {the}, if not make it {colour_c}",
        ),
    ),
    "count": (
        ("the sign tells how many {kinds_a} there are", "the sign gives the number of {kinds_a}"),
        ("write on the sign how many {kinds_a} there are", "let the sign give the number of {kinds_a}"),
    ),
    "sum": (
        ("the sign tells what {a} and {b} make together", "the sign gives the sum of {a} and {b}"),
        ("write the sum of {a} and {b} on the sign", "let the sign tell what {a} and {b} make together"),
    ),
    "gravity": (
        ("nothing holds these shapes up any more", "everything falls down", "these shapes become heavy as stones"),
        ("let everything fall to the ground", "give these shapes their weight back"),
    ),
    "seesaw_tips": (
        ("the seesaw feels the weight of its neighbours", "the two beside the seesaw sit down on it"),
        ("let the seesaw tip under its neighbours", "show the seesaw as the weights beside it demand"),
    ),
    "heavier_left": (
        (
            "the heavier shape sits on the left of the seesaw and the lighter one on the right",
            "both shapes are seated on the seesaw, the heavier one on the left",
        ),
        (
            "put the heavier shape on the left of the seesaw and the lighter one on the right",
            "seat both shapes on the seesaw, the heavier one on the left",
        ),
    ),
}
