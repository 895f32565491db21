"""Reasoning texts written by hand, and what each one concludes: (options, text, conclusion); "" where it never concludes.

The hundred of TEXTS were written before the reader was, in the manner of models of this size; a conclusion is the last one said.
The twenty of HELD_BACK were written after it and it was not changed for them: what it gets of those is nearer to its worth.
"""

BALL = ["A. red", "B. blue", "C. green", "D. yellow"]
WASH = ["A. open tap", "B. close drawer", "C. cut onion", "D. take fork"]
MOVE = ["A. The man walks to the left", "B. The man walks to the right", "C. The man stands still", "D. The man sits down"]
CHEM = ["A. Electrophoresis", "B. Distillation", "C. Chromatography", "D. Titration", "E. Filtration"]
YES = ["A. yes", "B. no"]
WHY = ["A. to get a better view", "B. because he is tired", "C. to pick up the ball", "D. to greet the dog", "E. he lost his balance"]
SIDE = ["A. front-left", "B. front-right", "C. back-left", "D. back-right"]
ORDER = ["A. chair, table, lamp", "B. table, chair, lamp", "C. lamp, table, chair", "D. lamp, chair, table"]
COUNT = ["A. 2", "B. 3", "C. 4", "D. 5"]
MOOD = ["(A) happy", "(B) sad", "(C) surprised", "(D) neutral"]
NONE = []

LETTERS = [
    (BALL, "The video opens with a ball on the floor. It is clearly blue in every frame. So the answer is B.", "B"),
    (BALL, "I see a green ball rolling past the table, so the correct option is C.", "C"),
    (WASH, "The person has a dirty cup in hand and stands at the sink. Before washing, water is needed. Therefore, option A is "
           "correct.", "A"),
    (WASH, "Let me think. The goal is to eat salad. The onion is already cut, the drawer is open. A fork is missing. Thus the answer is "
           "(D).", "D"),
    (MOVE, "At the start the man is near the door and then he moves toward the window on the right. Hence, the answer should be B.", "B"),
    (CHEM, "The setup has a stationary phase and a solvent that climbs the paper, which separates pigments. That matches option C.", "C"),
    (CHEM, "A burette drips into a flask until the colour changes.\n\nAnswer: D", "D"),
    (CHEM, "Okay, so we have a condenser and a round-bottom flask. The liquid boils and is collected. I'll go with B.", "B"),
    (YES, "The dog never leaves the yard during the clip, thus the right choice is B.", "B"),
    (YES, "In the second half, the light does turn on. So, A.", "A"),
    (WHY, "He bends down at 0:07 and his hand closes around the ball at 0:09. The best answer is C.", "C"),
    (WHY, "He stumbles before he falls, there is nothing to look at and the dog is away. My final answer is **E**.", "E"),
    (SIDE, "Standing by the stove and facing the sofa, the lamp lies behind me and to the left. So the final answer is C", "C"),
    (SIDE, "If I stand at the door facing the TV, the bin appears ahead and right of me. The answer must be option B.", "B"),
    (ORDER, "Lamp comes up first at 2 s, then the chair at 5 s, and the table last. This corresponds to D.", "D"),
    (ORDER, "First appearance times: table 1 s, chair 4 s, lamp 9 s. This sequence is listed in option B.", "B"),
    (COUNT, "There are two mugs on the shelf, one in the sink and one more on the desk. That makes four, so C is the right answer.", "C"),
    (COUNT, "I can count three people entering the frame. Answer is B", "B"),
    (MOOD, "His eyebrows go up and his mouth opens. Option (C) it is.", "C"),
    (MOOD, "The corners of her mouth are turned down all the time. => B", "B"),
    (BALL, "Frame 1: nothing. Frame 4: a yellow ball enters. Frame 9: it leaves. I choose D.", "D"),
    (WASH, "A is already done, B makes no sense here and D comes later. We are left with C.", "C"),
    (MOVE, "Options A, B and D all need a movement, but between the frames the man's position does not change. The answer, then, is "
           "C.", "C"),
    (CHEM, "We can eliminate B, D and E since no liquid is boiled, dripped or poured through a filter. Between A and C, the electric field "
           "points to A.", "A"),
    (SIDE, "Hmm, the chair is on my right side. And it's behind. Let me double check with the map: yes, behind right. \\boxed{D}", "D"),
    (WHY, "The kid runs to the dog and waves, so I believe D would be the most suitable answer.", "D"),
    (COUNT, "Based on the frames, the number of cups grows from 2 to 5, with the fifth placed at 0:41. Therefore the answer is D. 5.", "D"),
    (YES, "The question asks if the person puts the book back. At 00:31 they return it to the shelf. Therefore: A.", "A"),
]

OPTION_TEXTS = [
    (BALL, "The ball that rolls into view after the scene change has a blue surface. So the ball is blue.", "B"),
    (BALL, "Looking at the frames after the cut, I only see one ball, and its colour is green.", "C"),
    (WASH, "The cup is dirty and no water is running yet, so the next step is to open tap.", "A"),
    (WASH, "All the vegetables are on the board. The pan is hot. The next action should be to cut onion.", "C"),
    (MOVE, "His shoulder gets closer to the left border in each frame. Therefore the man walks to the left.", "A"),
    (MOVE, "He bends his knees near the bench and after that his head is lower. This means that the man sits down.", "D"),
    (CHEM, "Different dyes travel different distances with the solvent front; this is the principle of chromatography.", "C"),
    (CHEM, "The residue stays on the paper in the funnel and the clear liquid passes. The process shown is therefore filtration.", "E"),
    (CHEM, "It uses a gel, two electrodes and DNA with loading dye, so it has to be Electrophoresis.", "A"),
    (YES, "Does the woman open the window? I see her hand on the handle and then curtains moving in the wind. So yes.", "A"),
    (YES, "He never touches the guitar in any of the sampled frames. So the answer is no.", "B"),
    (WHY, "He steps onto the bench and raises his head over the crowd. He does it to get a better view.", "A"),
    (WHY, "The boy yawned twice and rubbed his eyes before lying down. Likely he lay down because he is tired.", "B"),
    (WHY, "The man slipped on the wet tiles, and his arms went up. In conclusion, he lost his balance.", "E"),
    (SIDE, "With the fridge in front of me, the sink would be ahead and a bit to my left, i.e. front-left.", "A"),
    (SIDE, "I walk in, turn to face the bed. The desk is now over my right shoulder. So the desk is to my back-right.", "D"),
    (ORDER, "At 3 s the table is visible. At 8 s the chair. At 12 s the lamp. So the order is table, chair, lamp.", "B"),
    (ORDER, "The camera starts on the lamp, pans to the table, and ends with the chair. Order of appearance: lamp, table, chair.", "C"),
    (COUNT, "There are pens at the left (2) and at the right (1), so in total there are 3 pens.", "B"),
    (COUNT, "Counting the chairs around the table one by one: 1, 2, 3, 4, 5. So there are 5 chairs.", "D"),
    (MOOD, "She smiles and claps. She looks happy.", "A"),
    (MOOD, "His face shows no strong emotion at any time, the lips stay closed. The expression is best described as neutral.", "D"),
    (BALL, "Scene three starts at 8 s. There, the balls are yellow, so the answer is yellow.", "D"),
    (MOVE, "Compare the first and the last frame: the distance to the right wall shrinks. I conclude that the man walks to the "
           "right.", "B"),
    (WHY, "There's a small brown dog and the man crouches and stretches out a hand with a smile. I think he bent down to greet the "
          "dog.", "D"),
    (SIDE, "Taking the person's view: stove ahead, window to the right. The plant stands between these two, so it would be in the "
           "front-right direction.", "B"),
]

NUMBERS = [
    (NONE, "I count the chairs: two at the table, one by the window and one in the corner. So there are 4 chairs.", "4"),
    (NONE, "The room seems to be about 5 m long and 4 m wide, so its area is about 20 square meters.", "20"),
    (NONE, "Using the door as a reference (2 m), the distance to the sofa is roughly one and a half doors. So the distance is 3.0 "
           "meters.", "3.0"),
    (NONE, "The table's longest side is about 160 cm. Therefore the answer is 160.", "160"),
    (NONE, "Three scenes, and balls: 2, 3 and 1. Adding them up, 2 + 3 + 1 = 6.", "6"),
    (NONE, "There are seven birds in the sky in total.", "7"),
    (NONE, "In scene 2 I see three red balls. The answer is three.", "3"),
    (NONE, "The price tag reads $1,250 and two items are bought. 2 * 1,250 = 2,500. Answer: 2,500", "2,500"),
    (NONE, "From 00:04 to 00:12 the man claps. He claps 9 times. So the answer is 9.", "9"),
    (NONE, "The bar for 2019 is at 42.5 and for 2020 at 45.0. The difference is 2.5.", "2.5"),
    (NONE, "The temperature goes down from 3 degrees to below zero, so the final value is -4.", "-4"),
    (NONE, "The angle between both hands of the clock is \\boxed{120}", "120"),
    (NONE, "Let's count the windows again: first floor 6, second floor 6. Total = 12 windows.", "12"),
    (NONE, "The height of the fridge is approximately 180 cm, given that the counter is 90 cm high.", "180"),
    (NONE, "At 0:05 one car passes, at 0:09 another one, at 0:13 a third. No other cars. Hence, 3.", "3"),
    (NONE, "The scale shows 0.75 kg. I would say 0.75 is the answer.", "0.75"),
    (NONE, "There is one bed, and I see two pillows on it. The question is about pillows, so I answer 2.", "2"),
    (NONE, "Half of the 50 students raise a hand, which gives us 25 students.", "25"),
]

CONTRADICTIONS = [
    (BALL, "The ball looks red at first, so the answer is A. Wait, the asked scene is the later one, where it is blue. So the answer is "
           "B.", "B"),
    (BALL, "It might be B. But no, the lighting is blue, the ball itself is green. Therefore C.", "C"),
    (WASH, "Option B seems right because the drawer is open. However, the goal is to wash, so option A is the correct answer.", "A"),
    (WASH, "The answer is D. Hmm, hold on. The fork is already on the table. Let me look again. The onion is whole. The answer is C.", "C"),
    (MOVE, "He walks to the left. Actually the camera moves, not the man. He stays where he is. So the man stands still.", "C"),
    (CHEM, "I first thought of filtration because of the funnel. But the liquid is heated and condensed again, so it is "
           "distillation.", "B"),
    (CHEM, "So the answer is A... no wait, there is no current. Solvent moves up the paper. The answer is C, not A.", "C"),
    (YES, "Yes, she opens it. Hmm, in the next frame the door is still closed, and it stays closed. So the answer is no.", "B"),
    (SIDE, "This would be front-left. But I have to take the other viewpoint: facing the door. Then left becomes right. So it is "
           "front-right.", "B"),
    (ORDER, "The order is chair, table, lamp (A). Let me recheck the frames: the lamp is on screen at 0 s. So it is lamp, chair, table "
            "(D).", "D"),
    (COUNT, "I count 4 cups. Looking again, one is a bowl. So there are 3 cups and the answer is B.", "B"),
    (MOOD, "The answer is (A) since she laughs. On second thought, the laugh comes from another person; she is crying. The answer is "
           "(B).", "B"),
    (NONE, "There are 5 chairs. Wait, one of them is a stool. So there are 4 chairs.", "4"),
    (NONE, "The area is 24 square meters. Oh, I forgot the alcove, which adds 3. So the area is 27 square meters.", "27"),
    (WHY, "He kneels because he is tired, so B. But look at 0:12: his hand reaches for the ball. So it's actually C.", "C"),
    (BALL, "The answer is not A, because red only shows in the first scene. It is not C either. The answer is D.", "D"),
]

NEVER = [
    (BALL, "The video shows a room with a wooden floor. There is some furniture. I need to look at the frames more carefully.", ""),
    (WASH, "First I need to understand the task. The person is in a kitchen. There are many objects around. Let me think about what "
           "happens", ""),
    (MOVE, "The person in the video is wearing a jacket and there are some trees in the background.", ""),
    (CHEM, "We need to identify the technique. Let me recall what each of the techniques does, one after another.", ""),
    (YES, "The video starts with a shot of a city. It is hard to tell what the person is doing from these frames.", ""),
    (WHY, "Why does he do this? The video has no sound, and the frames are too blurry to see the face.", ""),
    (SIDE, "The room has a bed, a desk and two windows. I would have to imagine myself next to the bed. Then I look at the desk.", ""),
    (MOOD, "I cannot determine it from the frames, as the face of the woman is not visible.", ""),
    (NONE, "To count the chairs I have to look at every frame. Some of them could be the same chair from another angle.", ""),
    (NONE, "The size of the room is difficult to judge, since there is no object of known size.", ""),
    (BALL, "The ball could be red or it could be blue; the picture is too dark to tell which.", ""),
    (CHEM, "Let's consider the options. A uses a gel and a current. B uses heat. C uses a solvent on paper. D uses a burette. E uses a "
           "filter.", ""),
]

TEXTS = LETTERS + OPTION_TEXTS + NUMBERS + CONTRADICTIONS + NEVER

HELD_BACK = [
    (BALL, "Going through it frame by frame, after the second cut the background turns grey and a single blue ball rolls in from the left. "
           "Nothing else of that shape appears. B is what I would answer.", "B"),
    (WASH, "The person holds a sponge and looks down at the basin. What is missing for washing is running water, which points us to the "
           "tap. Final choice: A", "A"),
    (MOVE, "Considering the four alternatives, only the second one describes the motion towards the right edge that we observe.", "B"),
    (CHEM, "What we observe is a slow dropwise addition with constant swirling until a persistent pink shows up. Such a procedure is known "
           "as titration.", "D"),
    (YES, "Is the lid put back on the jar before the end? The last frames display the jar with its lid lying next to it, so it isn't. The "
          "answer would be no.", "B"),
    (WHY, "A says better view, but nothing blocks his sight. B says tired, he has just arrived. C does not apply as no ball exists. E is "
          "about balance, he is steady. That leaves D.", "D"),
    (SIDE, "Imagine sitting on the sofa with the TV in front. The shelf stands against the wall behind the sofa, on the left-hand side. "
           "Consequently, back-left is the direction we are looking for.", "C"),
    (ORDER, "0:02 lamp, 0:06 chair, 0:11 table. Matching it with the choices gives D.", "D"),
    (COUNT, "Let me count again: one on the left, one in the middle, two near the window. Four in total.", "C"),
    (MOOD, "Her shoulders drop and she wipes her eyes. The emotion conveyed in this scene is sadness; the option closest to this is (B) "
           "sad.", "B"),
    (NONE, "The kitchen is 3 m by 4 m. Multiplying the two gives an area of 12 m2.", "12"),
    (NONE, "I notice six plates stacked up, then the man takes away two. What remains is four plates.", "4"),
    (NONE, "The sofa is roughly 2.2 meters wide, judging by the door next to it, which is usually 0.9 meters.", "2.2"),
    (NONE, "A total of 15 people can be seen walking past between 0:10 and 0:30.", "15"),
    (BALL, "My first impression was green. But that is the table cloth; what moves is red. Red it is.", "A"),
    (CHEM, "Answer: B. Hmm, I should double-check. There is no heating at all in the clip, and there is a filter paper in the funnel. "
           "Changing my answer to E.", "E"),
    (YES, "I was going to say yes, but the person stops in front of the door and turns around without entering. No.", "B"),
    (MOVE, "The camera is shaky and the man is only seen in two frames, so nothing can be said about his movement with confidence.", ""),
    (WASH, "I will describe what I see: a pan, a knife, an onion, a drawer and a tap. The person reaches out with the right hand.", ""),
    (NONE, "Let me estimate the length of the table. The chairs next to it help as a reference.", ""),
]
