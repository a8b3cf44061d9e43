"""Types of what labelled texts hold, and of what models of them return; beside those of :mod:`nemolet.types`."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from nemolet.types import Hidden, Labels, Logits, LogProbs, NeuralType, Positions

HiddenBD = Annotated[Tensor, NeuralType("B D", Hidden())]
WordsBU = Annotated[Tensor, NeuralType("B U", Positions())]
LabelsBU = Annotated[Tensor, NeuralType("B U", Labels())]
LabelsBV = Annotated[Tensor, NeuralType("B V", Labels())]
LogitsBUV = Annotated[Tensor, NeuralType("B U V", Logits())]
LogitsPV = Annotated[Tensor, NeuralType("P V", Logits())]
LogitsBP = Annotated[Tensor, NeuralType("B P", Logits())]
LogitsBT = Annotated[Tensor, NeuralType("B T", Logits())]
ClassesB = Annotated[Tensor, NeuralType("B", Labels("P"))]
PlacesB = Annotated[Tensor, NeuralType("B", Labels("T"))]
LabelsBS = Annotated[Tensor, NeuralType("B S", Labels())]
ScoresB = Annotated[Tensor, NeuralType("B", LogProbs())]
