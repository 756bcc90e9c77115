"""LlamaGen-REPA: the representation alignment that Mirai-I is compared with.

    python -m mirai_jax.main --config=configs/llamagen_repa.py[:scale]

At imagenet scales this is the baseline as GEAR trains it (arXiv 2601.17124 reports it first). It aligns
with the same encoder as Mirai-I, and differs from Mirai-I in:

* the position: the state that *predicts* a token aligns with that token's patch, for all L positions;
  Mirai-I aligns the state that has consumed the token;
* the block: a third of the depth (4, 8, 12 for B, L, XL); Mirai-I: two thirds;
* the weight: 0.5; Mirai-I: 2;
* the projector's initialisation: PyTorch's default; Mirai-I: N(0, 0.02);
* AdamW: betas 0.9 and 0.999, no weight decay; Mirai-I: 0.9 and 0.95, 0.05 on matrices;
* the images: any crop along the long side of the whole image, mirrored by chance, with codes made
  online; Mirai-I: one of ten crops, with stored codes.

It needs no shards, but the images, the tokenizer and the encoder:

    --config.data.images=IMAGENET/train --config.tokenizer.path=vq_ds16_c2i.pt
    --config.teacher.path=dinov2_vitb14_pretrain.pth
"""

from configs import base

_LAYERS = {"B": 12, "L": 24, "XL": 36, "XXL": 48, "3B": 24}


def get_config(scale: str = ""):
    config = base.get_config(scale)
    config.name = "llamagen_repa"
    layers = config.model.num_layers or _LAYERS[config.model.size]
    config.foresight = (
        base.term(
            config,
            source="bidirectional",
            anchor="predicted",
            offsets=((0, 0),),
            weights=(0.5,),
            student_layer=max(1, round(layers / 3)),
            start_epoch=0.0,
            schedule=(),
            projector_init="torch",
        ),
    )
    config.optimizer.update(b1=0.9, b2=0.999, weight_decay=0.0, decayed="all")
    if config.data.name == "images":  # the small sets have no crops
        config.data.update(codes="online", crops="random")
    return config
