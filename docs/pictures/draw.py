"""Draw the pictures of the documentation: ``python docs/pictures/draw.py``."""

from pathlib import Path

import nemolet as nl

here = Path(__file__).parent

# A graph made in Python: the example of the README.
embed = nl.nn.Embedding("V", "D", 65, 384)
decoder = nl.language.Decoder(layers=6, width=384, heads=6)
head = nl.nn.Head("D", "V", tied=embed)
loss = nl.language.CrossEntropy()
tokens, labels = nl.Input(nl.TokenIdsBT), nl.Input(nl.LabelsBT)
graph = nl.Graph(loss(logits=head(decoder(embed(tokens))), labels=labels))
graph.draw(str(here / "graph.svg"))

# The same parts as a task model, which is a module of one box in the graph that is trained ...
model = nl.language.CausalLM(vocab_size=65, layers=6, width=384, heads=6, context=256)
nl.training.training_graph(model, loss).draw(str(here / "training.svg"))

# ... and a graph inside.
model.graph.draw(str(here / "causal_lm.svg"))
