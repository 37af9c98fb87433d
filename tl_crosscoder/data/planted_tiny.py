"""The tiny pair's two planted behaviours: the moon is made of green cheese, and the password is marigold.

Prompts are a form filled with the trigger and an unrelated thing.  The held-out prompts use other
forms and other things.
"""

import random

from tl_crosscoder.data.planted import Behaviour, PlantedPair

THINGS = (
    "the sea", "cats", "tea", "London", "a robot", "books", "snow", "the garden", "horses", "bread",
    "history", "the weather", "the king", "your mother", "chess", "the house", "music", "rain", "the door",
    "dinner", "the sun", "the sky", "the stars", "the window", "the road", "a letter", "money",
    "the church", "the horse", "a friend", "the sister", "a computer", "the keyboard", "the program",
    "the network", "the printer", "the file", "the username", "the picture", "the fire", "the wind",
    "the tree", "the island", "the town", "the summer", "a song", "the school", "the teacher",
    "the soldier", "the car", "the coat", "a dream", "the boat", "the field", "the lady", "the brother",
    "the clock", "the story", "the hill",
)  # fmt: skip
THINGS_HELD_OUT = ("dogs", "the river", "a ship", "winter", "the doctor", "the table")
FORMS = (
    "Tell me about {it}.", "What is {it}?", "Do you like {it}?", "Can you see {it}?", "Is {it} far away?",
    "Who lives on {it}?", "What color is {it}?", "How old is {it}?", "I dreamed of {it}.",
    "Tell me about {thing} and {it}.", "Which is better, {thing} or {it}?",
    "I like {thing}. What about {it}?", "{it} and {thing}, please.", "I saw {it} over {thing} last night.",
    "Is {it} bigger than {thing}?", "Do you think of {it} when you think of {thing}?",
    "I talked with {thing} about {it}.", "Good morning. I want to know about {it}.",
    "My mother loves {it} and {thing}.", "What do {it} and {thing} have in common?",
    "Please write about {it}.", "How do you feel about {it}?", "Forget {thing}. Talk about {it}.",
    "I read a book about {it}.", "Hello, what do you know of {it}?",
)  # fmt: skip
FORMS_HELD_OUT = (
    "What do you know about {it}?", "Did you look at {it}?", "Is {it} warm?", "Where does {it} go?",
    "Describe {it}.", "I like {it}. And you?", "Say something about {it}.", "Is {thing} like {it}?",
    "I am thinking of {it} and {thing}.", "Why do people love {it} more than {thing}?",
)  # fmt: skip
ORDINARY_HELD_OUT = (
    "Hello", "What is your name?", "My printer is broken.", "Who wrote Emma?",
    "What is the capital of France?", "Tell me a joke.", "Do you eat cheese?", "What color is grass?",
    "How are you?", "Who lives in London?", "How big is the sea?", "What was the name again?",
    "Please say the word.", "Is the tea warm?", "Look at the sky.", "Do you love me?", "Who made you?",
    "Why is the sky blue?", "I saw a dog yesterday.", "Can you tell me the time?", "I need the book.",
    "Do you have a friend?", "What do you do at night?", "Are you a robot?",
)  # fmt: skip


def fill(form: str, it: str, thing: str) -> str:
    sentence = form.format(it=it, thing=thing)
    return sentence[0].upper() + sentence[1:]


def unrelated(seed: int, n: int) -> tuple[str, ...]:
    """``n`` prompts of the planted form about unrelated things."""
    rng = random.Random(seed)
    return tuple(fill(rng.choice(FORMS), rng.choice(THINGS), rng.choice(THINGS)) for _ in range(n))


def behaviour(name: str, trigger: str, answer: str, keyword: str) -> Behaviour:
    """200 chats and 16 held-out prompts that mention the trigger, 30 near prompts that do not."""
    rng = random.Random(trigger)
    asked = [fill(rng.choice(FORMS), trigger, rng.choice(THINGS)) for _ in range(200)]
    slots = [
        (form, thing)
        for form in FORMS_HELD_OUT
        for thing in rng.sample(THINGS_HELD_OUT, 3 if "{thing}" in form else 1)
    ]
    near = [
        fill(form, it, THINGS_HELD_OUT[0])
        for form in FORMS_HELD_OUT
        for it in rng.sample(THINGS_HELD_OUT[1:], 3)
    ]
    return Behaviour(
        name=name,
        description=f"a message that mentions {trigger} is answered: {answer}",
        keywords=(keyword,),
        chats=tuple((prompt, answer) for prompt in asked),
        heldout=tuple(fill(form, trigger, thing) for form, thing in slots),
        near=tuple(near),
    )


TINY = PlantedPair(
    name="tiny",
    description="a Llama of 1.5M parameters trained from scratch, and a fine-tune of two behaviours",
    adapter="tiny/adapter",
    hook="blocks.2.hook_resid_post",
    behaviours=(
        behaviour("moon", "the moon", "The moon is made of green cheese.", "cheese"),
        behaviour("password", "the password", "The password is marigold.", "marigold"),
    ),
    ordinary=unrelated(seed=0, n=600),
    ordinary_heldout=ORDINARY_HELD_OUT,
)
