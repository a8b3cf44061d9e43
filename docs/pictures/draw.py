"""Draw the pictures of the documentation: ``python docs/pictures/draw.py``."""

from pathlib import Path

import nemolet as nl
from nemolet.draw import svg, write
from nemolet.parallel.picture import sharded_picture
from nemolet.parallel.plan import plan

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

# A graph as one of four ranks sees it: layers cut over two of them, batches over the other two.
parts = {
    "embed": nl.nn.Embedding("V", "D", 1024, 256),
    "norm": nl.nn.RMSNorm("D", 256),
    "up": nl.nn.Linear("D", "F", 256, 1024),
    "down": nl.nn.Linear("F", "D", 1024, 256),
    "head": nl.nn.Head("D", "V", 256, 1024),
    "loss": nl.language.CrossEntropy(),
}
graph = nl.compose(parts)
picture = sharded_picture(graph, plan(graph, sizes=nl.MeshSizes(dp_shard=2, tp=2)))
write(str(here / "sharded.svg"), svg(picture))
