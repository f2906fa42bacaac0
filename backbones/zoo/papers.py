"""What the zoo's models were published in."""

from dataclasses import replace

from ..registry import Paper

RALA = Paper(
    name="RAVLT",
    arxiv="2411.07635",
    title="Breaking the Low-Rank Dilemma of Linear Attention",
    authors=(
        "Fan, Qihang",
        "Huang, Huaibo",
        "He, Ran",
    ),
    venue="CVPR",
    year=2025,
    origin="https://github.com/qhfan/RALA",
    license="mit",
    computes="linear attention whose keys are weighted by the global query and whose output is "
    "gated (stages 1 and 2); gated softmax attention over all tokens (3 and 4)",
    limits="stages 3 and 4 cost with the square of the pixels: at 4096 px a pixel takes several "
    "times what it takes at 1024 px",
    retrained="RAVLT-T 82.3 top-1, by the authors of MHLA (arXiv:2601.07832)",
)

MALA = Paper(
    name="MAViT",
    arxiv="2507.00698",
    title="Rectifying Magnitude Neglect in Linear Attention",
    authors=(
        "Fan, Qihang",
        "Huang, Huaibo",
        "Ai, Yuang",
        "He, Ran",
    ),
    venue="ICCV",
    year=2025,
    origin="https://github.com/qhfan/MALA",
    license=None,
    computes="linear attention whose sharpness grows with the query's length, as that of softmax "
    "does (stages 1 and 2); gated softmax attention over all tokens (3 and 4)",
    limits="those of RAVLT; the linear attention subtracts, so its weights may be negative",
    retrained="MAViT-T 82.4 and MAViT-S 84.3 top-1, by the authors of MHLA (arXiv:2601.07832)",
)

AGENT = Paper(
    name="Agent Attention",
    arxiv="2312.08874",
    title="Agent Attention: On the Integration of Softmax and Linear Attention",
    authors=(
        "Han, Dongchen",
        "Ye, Tianzhu",
        "Han, Yizeng",
        "Xia, Zhuofan",
        "Pan, Siyuan",
        "Wan, Pengfei",
        "Song, Shiji",
        "Huang, Gao",
    ),
    venue="ECCV",
    year=2024,
    origin="https://github.com/LeapLabTHU/Agent-Attention",
    license=None,
    computes="softmax attention of a few pooled queries, the agents, to all tokens, and of all "
    "tokens to the agents; in DeiT's, PVT's, Swin's and CSwin's bodies",
    limits="the number of agents is fixed, so that at large images each stands for more pixels; "
    "biases learned at 224 px are interpolated; later stages of the Swin and CSwin bodies, and "
    "blocks 5 to 12 of `agent_deit_base`, keep their body's softmax attention",
)

INLINE = Paper(
    name="InLine Attention",
    arxiv="2412.06590",
    title="Bridging the Divide: Reconsidering Softmax and Linear Attention",
    authors=(
        "Han, Dongchen",
        "Pu, Yifan",
        "Xia, Zhuofan",
        "Han, Yizeng",
        "Pan, Xuran",
        "Li, Xiu",
        "Lu, Jiwen",
        "Song, Shiji",
        "Huang, Gao",
    ),
    venue="NeurIPS",
    year=2024,
    origin="https://github.com/LeapLabTHU/InLine",
    license=None,
    computes="linear attention that is normalised by subtraction, and a convolution of the values "
    "whose kernels are predicted from the image; in DeiT's, PVT's, Swin's and CSwin's bodies",
    limits="weights of attention may be negative; the predicted kernels see 3 x 3 tokens; later "
    "stages of the Swin and CSwin bodies keep their body's softmax attention; the authors offer no "
    "detection or segmentation code",
)

FLATTEN = Paper(
    name="FLatten Transformer",
    arxiv="2308.00442",
    title="FLatten Transformer: Vision Transformer using Focused Linear Attention",
    authors=(
        "Han, Dongchen",
        "Pan, Xuran",
        "Han, Yizeng",
        "Song, Shiji",
        "Huang, Gao",
    ),
    venue="ICCV",
    year=2023,
    origin="https://github.com/LeapLabTHU/FLatten-Transformer",
    license=None,
    computes="linear attention whose feature map sharpens the direction of queries and keys, and a "
    "convolution of the values whose filters all heads share; in PVT's, PVTv2's, Swin's and "
    "CSwin's bodies",
    limits="the keys have learned positions of the size of the map, which are interpolated for "
    "other images; later stages of the Swin and CSwin bodies keep their body's softmax attention; "
    "the authors offer no detection or segmentation code",
)

NALA = Paper(
    name="NaLaFormer",
    arxiv="2506.21137",
    title="Norm×Direction: Restoring the Missing Query Norm in Vision Linear Attention",
    authors=(
        "Meng, Weikang",
        "Luo, Yadan",
        "Huo, Liangyu",
        "Li, Yingjian",
        "Wang, Yaowei",
        "Li, Xin",
        "Zhang, Zheng",
    ),
    venue="ICML",
    year=2026,
    origin="https://github.com/ZacharyMeng/NaLaFormer",
    license="mit",
    computes="linear attention of positive and negative parts of queries and keys, whose sharpness "
    "grows with the query's norm (stages 1 and 2); softmax attention over all tokens (3 and 4); "
    "both normalised and gated",
    limits="stages 3 and 4 cost with the square of the pixels; after the rotation, weights of the "
    "linear attention may be negative; no weights are released",
)

SOFT = Paper(
    name="SOFT",
    arxiv="2110.11945",
    title="SOFT: Softmax-free Transformer with Linear Complexity",
    authors=(
        "Lu, Jiachen",
        "Yao, Jinghan",
        "Zhang, Junge",
        "Zhu, Xiatian",
        "Xu, Hang",
        "Gao, Weiguo",
        "Xu, Chunjing",
        "Xiang, Tao",
        "Zhang, Li",
    ),
    venue="NeurIPS",
    year=2021,
    origin="https://github.com/fudan-zvg/SOFT",
    license="mit",
    computes="a Gaussian kernel in place of softmax, approximated through landmarks whose matrix "
    "Newton's iteration inverts (stages 1 to 3); softmax attention over all tokens (4)",
    limits="the number of landmarks grows with the image: attention costs with the square of the "
    "pixels, the inverse with their cube, and at 512 px it takes most of the time; "
    "`soft_vit_tiny.in1k_2021` shares the limits of SOFT-Norm",
)

SOFT_NORM = Paper(
    name="SOFT-Norm",
    arxiv="2207.03341",
    title="Softmax-free Linear Transformers",
    authors=(
        "Lu, Jiachen",
        "Zhang, Junge",
        "Zhu, Xiatian",
        "Feng, Jianfeng",
        "Xiang, Tao",
        "Zhang, Li",
    ),
    venue="International Journal of Computer Vision",
    year=2024,
    journal=True,
    origin=SOFT.origin,
    license=SOFT.license,
    computes="SOFT whose inverse is divided by the roots of the landmark kernel's row sums on both "
    "sides",
    limits="those of SOFT; where Newton's iteration does not converge, the images of a batch "
    "depend on one another",
)

DEIT = Paper(
    name="DeiT",
    arxiv="2012.12877",
    title="Training data-efficient image transformers & distillation through attention",
    authors=(
        "Touvron, Hugo",
        "Cord, Matthieu",
        "Douze, Matthijs",
        "Massa, Francisco",
        "Sablayrolles, Alexandre",
        "Jégou, Hervé",
    ),
    venue="ICML",
    year=2021,
    origin="https://github.com/facebookresearch/deit",
    license="apache-2.0",
    computes="softmax attention over all tokens of 16 x 16 pixels",
    limits="cost grows with the square of the pixels; one map, of stride 16",
)

DINOV2 = Paper(
    name="DINOv2",
    arxiv="2304.07193",
    title="DINOv2: Learning Robust Visual Features without Supervision",
    authors=(
        "Oquab, Maxime",
        "Darcet, Timothée",
        "Moutakanni, Théo",
        "Vo, Huy",
        "Szafraniec, Marc",
        "Khalidov, Vasil",
        "Fernandez, Pierre",
        "Haziza, Daniel",
        "Massa, Francisco",
        "El-Nouby, Alaaeldin",
        "Assran, Mahmoud",
        "Ballas, Nicolas",
        "Galuba, Wojciech",
        "Howes, Russell",
        "Huang, Po-Yao",
        "Li, Shang-Wen",
        "Misra, Ishan",
        "Rabbat, Michael",
        "Sharma, Vasu",
        "Synnaeve, Gabriel",
        "Xu, Hu",
        "Jégou, Hervé",
        "Mairal, Julien",
        "Labatut, Patrick",
        "Joulin, Armand",
        "Bojanowski, Piotr",
    ),
    venue="Transactions on Machine Learning Research",
    year=2024,
    journal=True,
    origin="https://github.com/facebookresearch/dinov2",
    license="apache-2.0",
    computes="softmax attention over all tokens of 14 x 14 pixels, pretrained without labels",
    limits="cost grows with the square of the pixels; the weights have no classifier; one map, of "
    "stride 14",
)

DINOV3 = Paper(
    name="DINOv3",
    arxiv="2508.10104",
    title="DINOv3",
    authors=(
        "Siméoni, Oriane",
        "Vo, Huy V.",
        "Seitzer, Maximilian",
        "Baldassarre, Federico",
        "Oquab, Maxime",
        "Jose, Cijo",
        "Khalidov, Vasil",
        "Szafraniec, Marc",
        "Yi, Seungeun",
        "Ramamonjisoa, Michaël",
        "Massa, Francisco",
        "Haziza, Daniel",
        "Wehrstedt, Luca",
        "Wang, Jianyuan",
        "Darcet, Timothée",
        "Moutakanni, Théo",
        "Sentana, Leonel",
        "Roberts, Claire",
        "Vedaldi, Andrea",
        "Tolan, Jamie",
        "Brandt, John",
        "Couprie, Camille",
        "Mairal, Julien",
        "Jégou, Hervé",
        "Labatut, Patrick",
        "Bojanowski, Piotr",
    ),
    venue="arXiv",
    year=2025,
    journal=True,
    origin="https://github.com/facebookresearch/dinov3",
    license="dinov3-license",
    computes="softmax attention over all tokens of 16 x 16 pixels with rotary positions, four "
    "register tokens, pretrained without labels",
    limits="cost grows with the square of the pixels; the weights have no classifier, and Meta's "
    "DINOv3 License, which is not an open-source licence; one map, of stride 16",
)

PVT = Paper(
    name="PVT",
    arxiv="2102.12122",
    title="Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without "
    "Convolutions",
    authors=(
        "Wang, Wenhai",
        "Xie, Enze",
        "Li, Xiang",
        "Fan, Deng-Ping",
        "Song, Kaitao",
        "Liang, Ding",
        "Lu, Tong",
        "Luo, Ping",
        "Shao, Ling",
    ),
    venue="ICCV",
    year=2021,
    origin="https://github.com/whai362/PVT",
    license="apache-2.0",
    computes="softmax attention to keys and values of a map that a strided convolution has made "
    "smaller",
    limits="the reduction is a fixed factor: cost grows with the square of the pixels",
)

PVTV2 = Paper(
    name="PVTv2",
    arxiv="2106.13797",
    title="PVT v2: Improved Baselines with Pyramid Vision Transformer",
    authors=PVT.authors,
    venue="Computational Visual Media",
    year=2022,
    journal=True,
    origin=PVT.origin,
    license=PVT.license,
    computes="PVT's attention in a body of overlapping patches, whose feed-forward networks "
    "convolve in place of position embeddings",
    limits="that of PVT",
)

SWIN = Paper(
    name="Swin",
    arxiv="2103.14030",
    title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    authors=(
        "Liu, Ze",
        "Lin, Yutong",
        "Cao, Yue",
        "Hu, Han",
        "Wei, Yixuan",
        "Zhang, Zheng",
        "Lin, Stephen",
        "Guo, Baining",
    ),
    venue="ICCV",
    year=2021,
    origin="https://github.com/microsoft/Swin-Transformer",
    license="mit",
    computes="softmax attention within windows of 7 x 7 tokens, shifted by half in every odd block",
    limits="no token sees beyond its window but through the blocks that follow",
)

CSWIN = Paper(
    name="CSwin",
    arxiv="2107.00652",
    title="CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows",
    authors=(
        "Dong, Xiaoyi",
        "Bao, Jianmin",
        "Chen, Dongdong",
        "Zhang, Weiming",
        "Yu, Nenghai",
        "Yuan, Lu",
        "Chen, Dong",
        "Guo, Baining",
    ),
    venue="CVPR",
    year=2022,
    origin="https://github.com/microsoft/CSWin-Transformer",
    license="mit",
    computes="softmax attention within stripes, vertical for half of the heads, horizontal for "
    "the other; over all tokens in the last stage",
    limits="stripes are as long as the image, so that cost grows faster than the pixels",
)

L2VIT = Paper(
    name="L2ViT",
    arxiv="2501.16182",
    title="The Linear Attention Resurrection in Vision Transformer",
    authors=("Zheng, Chuanyang",),
    venue="arXiv",
    year=2025,
    journal=True,
    origin="https://github.com/ChuanyangZheng/L2ViT",
    license="mit",
    computes="softmax attention within windows of 7 x 7 tokens in even blocks, linear attention "
    "over all tokens and a local concentration by 7 x 7 convolutions in odd ones",
    limits="the normaliser of the linear attention has a floor of 100, an absolute number, which "
    "acts on fewer tokens the larger the image is",
)

VAN = Paper(
    name="VAN",
    arxiv="2202.09741",
    title="Visual Attention Network",
    authors=(
        "Guo, Meng-Hao",
        "Lu, Cheng-Ze",
        "Liu, Zheng-Ning",
        "Cheng, Ming-Ming",
        "Hu, Shi-Min",
    ),
    venue="Computational Visual Media",
    year=2023,
    journal=True,
    origin="https://github.com/Visual-Attention-Network/VAN-Classification",
    license="apache-2.0",
    computes="a product of each token with what depthwise convolutions of 5 x 5 and, dilated, of "
    "7 x 7 tokens make of its neighbourhood; no softmax and no heads",
    limits="a block sees 23 x 23 tokens, and what is farther away only through other blocks; the "
    "authors trained B4 to B6 on ImageNet-22k, and no address of those weights is known; they ask "
    "whoever uses the models commercially to contact them",
)

SLAB = Paper(
    name="SLAB",
    arxiv="2405.11582",
    title="SLAB: Efficient Transformers with Simplified Linear Attention and Progressive "
    "Re-parameterized Batch Normalization",
    authors=(
        "Guo, Jialong",
        "Chen, Xinghao",
        "Tang, Yehui",
        "Wang, Yunhe",
    ),
    venue="ICML",
    year=2024,
    origin="https://github.com/xinghaochen/SLAB",
    license=None,
    computes="linear attention of rectified queries and keys, with a convolution of the values, "
    "and batch norms that training reaches from layer norms (PRepBN); in DeiT's, PVT's, PVTv2's, "
    "Swin's and CSwin's bodies",
    limits="positions of the keys learned at 224 px are interpolated; stages 3 and 4 of the Swin "
    "and CSwin bodies keep their body's softmax attention; `reparameterize_model` merges the norms "
    "into their neighbours, without which evaluation gains little; training needs the hook "
    "`NormProgressHook`, or calls of `set_training_progress`",
)

PREPBN = replace(
    SLAB,
    name="PRepBN",
    computes="softmax attention, and batch norms that training reaches from layer norms; in "
    "DeiT's, PVT's and Swin's bodies",
    limits="those of the body; training as for SLAB; `prepbn_deit_tiny` and `prepbn_swin_tiny` "
    "have the batch norm from the beginning, as their authors' code does",
)

POLAFORMER = Paper(
    name="PolaFormer",
    arxiv="2501.15061",
    title="PolaFormer: Polarity-aware Linear Attention for Vision Transformers",
    authors=(
        "Meng, Weikang",
        "Luo, Yadan",
        "Li, Xin",
        "Jiang, Dongmei",
        "Zhang, Zheng",
    ),
    venue="ICLR",
    year=2025,
    origin="https://github.com/ZacharyMeng/PolaFormer",
    license="mit",
    computes="linear attention in which one half of the values is summed over keys of the query's "
    "sign and the other half over keys of the opposite sign, with a learned power per channel, a "
    "convolution of the values and a gate; in PVT's and Swin's bodies",
    limits="positions of the keys learned at 224 px are interpolated; stages 3 and 4 of the Swin "
    "body keep its softmax attention; the authors offer no detection or segmentation code",
)

CARE = Paper(
    name="CARE",
    arxiv="2411.16170",
    title="CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual "
    "Interaction",
    authors=(
        "Zhou, Yuan",
        "Xu, Qingshan",
        "Cui, Jiequan",
        "Zhou, Junbao",
        "Zhang, Jing",
        "Hong, Richang",
        "Zhang, Hanwang",
    ),
    venue="CVPR",
    year=2025,
    origin="https://github.com/zhouyuan888888/CARE-Transformer",
    license=None,
    computes="in stages 3 and 4, linear attention on a quarter of the channels and depthwise "
    "convolutions on two others, which networks with convolutions then mix with the last; in "
    "stages 1 and 2, long convolutions in the attention's place",
    limits="made for phones and narrow: in the first two stages a token sees 11 rows and columns; "
    "batch norms everywhere, which small batches train badly; trained with a teacher",
)

FLOWFORMER = Paper(
    name="Flowformer",
    arxiv="2202.06258",
    title="Flowformer: Linearizing Transformers with Conservation Flows",
    authors=(
        "Wu, Haixu",
        "Wu, Jialong",
        "Xu, Jiehui",
        "Wang, Jianmin",
        "Long, Mingsheng",
    ),
    venue="ICML",
    year=2022,
    origin="https://github.com/thuml/Flowformer",
    license="mit",
    computes="linear attention between sigmoids of queries and keys, in which keys compete by a "
    "softmax of what they give out when each query takes in one unit, in all four stages",
    limits="narrow heads (8 channels in the first stage); one position embedding, learned at "
    "224 px and interpolated; no results on detection or segmentation",
)

TWINS = Paper(
    name="Twins",
    arxiv="2104.13840",
    title="Twins: Revisiting the Design of Spatial Attention in Vision Transformers",
    authors=(
        "Chu, Xiangxiang",
        "Tian, Zhi",
        "Wang, Yuqing",
        "Zhang, Bo",
        "Ren, Haibing",
        "Wei, Xiaolin",
        "Xia, Huaxia",
        "Shen, Chunhua",
    ),
    venue="NeurIPS",
    year=2021,
    origin="https://github.com/Meituan-AutoML/Twins",
    license="apache-2.0",
    computes="softmax attention within windows of 7 x 7 tokens, and in every odd block to keys and "
    "values of a map that a strided convolution has made smaller; convolutions tell positions",
    limits="the reduction is a fixed factor: cost grows with the square of the pixels",
)

ECOFORMER = Paper(
    name="EcoFormer",
    arxiv="2209.09004",
    title="EcoFormer: Energy-Saving Attention with Linear Complexity",
    authors=(
        "Liu, Jing",
        "Pan, Zizheng",
        "He, Haoyu",
        "Cai, Jianfei",
        "Zhuang, Bohan",
    ),
    venue="NeurIPS",
    year=2022,
    origin="https://github.com/ziplab/EcoFormer",
    license="apache-2.0",
    computes="linear attention between binary codes of 16 bits that queries and keys share "
    "(stages 1 to 3); softmax attention over all tokens (4); in PVTv2's and Twins' bodies",
    limits="for inference and fine-tuning of released weights: the hash functions are constants "
    "that come with them; its additions save energy on other hardware than GPUs; a sign is exact "
    "nowhere near zero, so that precisions differ in some bits",
)

MHLA = Paper(
    name="MHLA",
    arxiv="2601.07832",
    title="MHLA: Restoring Expressivity of Linear Attention via Token-Level Multi-Head",
    authors=(
        "Zhang, Kewei",
        "Huang, Ye",
        "Deng, Yufan",
        "Yu, Jincheng",
        "Chen, Junsong",
        "Ling, Huan",
        "Xie, Enze",
        "Zhou, Daquan",
    ),
    venue="ICLR",
    year=2026,
    origin="https://github.com/DAGroup-PKU/MHLA",
    license="mit",
    computes="linear attention with a state for each of 4 x 4 squares of the map, which a learned "
    "matrix mixes; in DeiT's body without a class token",
    limits="the authors have published neither weights nor results of these classifiers; images "
    "of 224 px are padded to 256 px; the normaliser mixes queries of other squares, so that the "
    "weights of a query do not sum to one; one map, of stride 16",
)

FAVIT = Paper(
    name="FaViT",
    arxiv="2312.08614",
    title="Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost",
    authors=(
        "Qin, Haolin",
        "Zhou, Daquan",
        "Xu, Tingfa",
        "Bian, Ziyang",
        "Li, Jianan",
    ),
    venue="IEEE Transactions on Neural Networks and Learning Systems",
    year=2023,
    journal=True,
    origin="https://github.com/q2479036243/FaViT",
    license=None,
    computes="softmax attention of shares of the channels to few keys: the 7 x 7 places of "
    "windows, dense and dilated, averaged over the windows, and a map that a strided convolution "
    "has made smaller; in PVTv2's body",
    limits="the reduction of the map is a fixed factor, so that an eighth of the channels costs "
    "with the square of the pixels; the average over windows mixes channels, as the authors' code "
    "does; the authors have published no weights",
)
